from __future__ import annotations

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from services.runtime import tracing


@pytest.fixture(autouse=True)
def _clean_context() -> None:
    structlog.contextvars.clear_contextvars()


def test_what_is_sent_is_what_arrives() -> None:
    tracing.bind_request_id("req-1")
    with TracerProvider().get_tracer("t").start_as_current_span("s") as span:
        metadata = tracing.outgoing_metadata()
    request_id, context = tracing.incoming_context(metadata)
    assert request_id == "req-1"
    remote = trace.get_current_span(context).get_span_context()
    assert remote.is_remote
    assert (remote.trace_id, remote.span_id) == (span.get_span_context().trace_id, span.get_span_context().span_id)


def test_nothing_is_sent_without_a_request() -> None:
    assert tracing.outgoing_metadata() == ()
    assert tracing.incoming_context([])[0] is None


@pytest.mark.parametrize("text", ["", "x" * 129, "new\nline", "Grüße"])
def test_what_is_no_request_id(text: str) -> None:
    assert not tracing.is_request_id(text)
    assert tracing.incoming_context([("x-request-id", text)])[0] is None
    tracing.bind_request_id(text)
    assert tracing.outgoing_metadata() == ()


def test_an_exporter_that_is_not_installed_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    installed: list[object] = []
    monkeypatch.setattr(trace, "set_tracer_provider", installed.append)
    with structlog.testing.capture_logs() as lines:
        tracing.configure("test")
    (line,) = lines
    assert "opentelemetry-exporter-otlp-proto-grpc" in line["event"]
    assert isinstance(installed[0], TracerProvider)
    assert installed[0].resource.attributes["service.name"] == "kvferry-test"
