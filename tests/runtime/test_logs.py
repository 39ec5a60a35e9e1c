from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from kvferry.errors import InvalidRequestError, NotFoundError, UnavailableError
from services.runtime import logs, tracing


@contextmanager
def logged(*, terminal: bool = False) -> Iterator[io.StringIO]:
    """Captures stderr; not a fixture, because pytest puts its own stderr in place after fixtures are set up."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        with redirect_stderr(stream):
            yield stream
    finally:
        root.handlers, root.level = handlers, level
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()


def entries(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_carry_service_request_and_trace() -> None:
    with logged() as stream:
        logs.configure("test")
        tracing.bind_request_id("req-1")
        with TracerProvider().get_tracer("t").start_as_current_span("s") as span:
            structlog.stdlib.get_logger("a.b").info("hello", answer=42)
            logging.getLogger("uvicorn.error").warning("from %s", "stdlib", extra={"more": 1})
    expected_trace = trace.format_trace_id(span.get_span_context().trace_id)
    first, second = entries(stream)
    assert (first["event"], first["answer"], first["level"], first["logger"]) == ("hello", 42, "info", "a.b")
    assert (second["event"], second["level"], second["logger"]) == ("from stdlib", "warning", "uvicorn.error")
    for entry in (first, second):
        assert (entry["service"], entry["request_id"], entry["trace_id"]) == ("test", "req-1", expected_trace)
        assert entry["timestamp"].endswith("Z")


def test_the_level_counts_for_both() -> None:
    with logged() as stream:
        logs.configure("test", level="warning")
        structlog.stdlib.get_logger("a").info("no")
        logging.getLogger("b").info("no")
        structlog.stdlib.get_logger("a").warning("yes")
    assert [entry["event"] for entry in entries(stream)] == ["yes"]


@pytest.mark.parametrize("json_lines", [True, False])
def test_tracebacks_are_in_the_line_and_locals_are_not(json_lines: bool) -> None:
    with logged() as stream:
        logs.configure("test", json=json_lines)
        prompt = "-".join(["the", "user's", "words"])
        try:
            raise ValueError("what went wrong")
        except ValueError:
            structlog.stdlib.get_logger("a").exception("failed", size=len(prompt))
    text = stream.getvalue()
    assert text.count("ValueError: what went wrong") == 1
    assert text.count("Traceback") == 1
    assert prompt not in text
    assert (text.count("\n") == 1) == json_lines


def test_a_terminal_gets_text() -> None:
    with logged(terminal=True) as stream:
        logs.configure("test")
        structlog.stdlib.get_logger("a").info("hello")
    assert "hello" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_of_a_clients_mistake_the_field_is_told_and_nothing_that_it_wrote() -> None:
    quoting = {"metadata": {"field": "chat.messages[0].role"}}
    for wrong in (InvalidRequestError("not 'secret'", **quoting), NotFoundError("not 'secret'", **quoting)):  # type: ignore[arg-type]
        assert logs.loggable(wrong) == "the request was wrong in chat.messages[0].role"
    assert logs.loggable(NotFoundError("no 'secret'")) == "the request was wrong"
    assert logs.loggable(UnavailableError("worker decode-0 was lost")) == "worker decode-0 was lost"
