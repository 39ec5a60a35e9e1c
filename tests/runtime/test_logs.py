from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from services.runtime import logs, tracing


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        yield stream
    finally:
        root.handlers, root.level = handlers, level
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()


def entries(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_carry_service_request_and_trace(stderr: io.StringIO) -> None:
    logs.configure("test")
    tracing.bind_request_id("req-1")
    with TracerProvider().get_tracer("t").start_as_current_span("s") as span:
        structlog.stdlib.get_logger("a.b").info("hello", answer=42)
        logging.getLogger("uvicorn.error").warning("from %s", "stdlib", extra={"more": 1})
    expected_trace = trace.format_trace_id(span.get_span_context().trace_id)
    first, second = entries(stderr)
    assert (first["event"], first["answer"], first["level"], first["logger"]) == ("hello", 42, "info", "a.b")
    assert (second["event"], second["level"], second["logger"]) == ("from stdlib", "warning", "uvicorn.error")
    for entry in (first, second):
        assert (entry["service"], entry["request_id"], entry["trace_id"]) == ("test", "req-1", expected_trace)
        assert entry["timestamp"].endswith("Z")


def test_the_level_counts_for_both(stderr: io.StringIO) -> None:
    logs.configure("test", level="warning")
    structlog.stdlib.get_logger("a").info("no")
    logging.getLogger("b").info("no")
    structlog.stdlib.get_logger("a").warning("yes")
    assert [entry["event"] for entry in entries(stderr)] == ["yes"]


def test_tracebacks_are_in_the_line_and_locals_are_not(stderr: io.StringIO) -> None:
    for json_lines in (True, False):
        logs.configure("test", json=json_lines)
        try:
            prompt = "the user's words"
            raise ValueError("what went wrong")
        except ValueError:
            structlog.stdlib.get_logger("a").exception("failed", size=len(prompt))
    text = stderr.getvalue()
    assert text.count("ValueError: what went wrong") == 2
    assert text.count("Traceback") == 2
    assert "the user's words\n" not in text.replace('prompt = "the user\'s words"', "")
    assert entries(io.StringIO(text.splitlines()[0]))[0]["event"] == "failed"


def test_a_terminal_gets_text(stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stderr, "isatty", lambda: True, raising=False)
    logs.configure("test")
    structlog.stdlib.get_logger("a").info("hello")
    assert "hello" in stderr.getvalue()
    assert not stderr.getvalue().startswith("{")
