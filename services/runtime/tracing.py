"""Trace context and request ids, carried through gRPC metadata as W3C traceparent and x-request-id."""

from __future__ import annotations

import contextvars
import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import structlog
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvferry.errors import Error
from services.runtime.logs import loggable

REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID_LENGTH = 128

_log = structlog.stdlib.get_logger(__name__)
_propagator = TraceContextTextMapPropagator()

P = ParamSpec("P")
T = TypeVar("T")


def configure(service: str) -> None:
    """Installs the process's tracer provider.  Spans are exported over OTLP when OTEL_EXPORTER_OTLP_ENDPOINT is set and
    opentelemetry-exporter-otlp-proto-grpc is installed, and are printed on stdout, each a line of JSON, when
    OTEL_TRACES_EXPORTER is "console"; otherwise they only give logs and metadata their trace ids.  Call once per process,
    after logs.configure."""
    provider = TracerProvider(resource=Resource.create({"service.name": f"kvferry-{service}"}))
    if endpoint := os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        try:
            exporter = importlib.import_module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
            processors = importlib.import_module("opentelemetry.sdk.trace.export")
            provider.add_span_processor(processors.BatchSpanProcessor(exporter.OTLPSpanExporter()))
            _log.info("spans are exported", endpoint=endpoint)
        except ImportError:
            _log.warning(
                "OTEL_EXPORTER_OTLP_ENDPOINT is set but spans are not exported: "
                "install opentelemetry-exporter-otlp-proto-grpc",
                endpoint=endpoint,
            )
    if os.environ.get("OTEL_TRACES_EXPORTER") == "console":
        provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=_line)))
    trace.set_tracer_provider(provider)


def _line(span: ReadableSpan) -> str:
    text: str = span.to_json(indent=None)
    return text + "\n"


def tracer() -> trace.Tracer:
    return trace.get_tracer("kvferry")


def is_request_id(text: str) -> bool:
    """Whether ``text`` may serve as a request id: 1 to 128 characters of printable ASCII."""
    return 0 < len(text) <= MAX_REQUEST_ID_LENGTH and text.isascii() and text.isprintable()


def bind_request_id(request_id: str) -> None:
    """From here on, this task's log lines carry the id and its outgoing calls send it."""
    structlog.contextvars.bind_contextvars(request_id=request_id)


def current_request_id() -> str | None:
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return request_id if isinstance(request_id, str) else None


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """What to send with a call made from the current task, so that the other side can join its trace and request."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    request_id = current_request_id()
    if request_id is not None and is_request_id(request_id):
        carrier[REQUEST_ID_KEY] = request_id
    return tuple(carrier.items())


def incoming_context(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str | None, otel_context.Context]:
    """The request id and the trace that a caller sent; an id that is no request id is ignored."""
    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    request_id = carrier.get(REQUEST_ID_KEY, "")
    return (request_id if is_request_id(request_id) else None), _propagator.extract(carrier)


@dataclass(frozen=True, slots=True)
class Request:
    """Whose trace and id go with what is done for a request by tasks that its own did not start."""

    context: otel_context.Context
    request_id: str | None

    @staticmethod
    def current() -> Request:
        return Request(otel_context.get_current(), current_request_id())

    def join(self) -> None:
        """The current task, from here to its end, is the request's."""
        otel_context.attach(self.context)
        if self.request_id is not None:
            bind_request_id(self.request_id)


class RequestScope:
    """One of several requests on a call: its id and its span, where a call of its own would hold them.  Ends with
    ``end``."""

    def __init__(self, name: str, carrier: Iterable[tuple[str, str | bytes]]) -> None:
        """``carrier`` is what the caller's ``outgoing_metadata`` gave."""
        request_id, parent = incoming_context(carrier)
        self._span = tracer().start_span(
            name, context=parent, kind=trace.SpanKind.SERVER, attributes={"rpc.system": "grpc", "rpc.method": name}
        )
        self._context = contextvars.Context()
        self._context.run(otel_context.attach, trace.set_span_in_context(self._span, parent))
        if request_id is not None:
            self._context.run(bind_request_id, request_id)

    def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``call``, whose log lines and outgoing calls, and those of the tasks that it starts, are the request's."""
        return self._context.run(call, *args, **kwargs)

    def end(self, error: Error | None = None) -> None:
        if error is not None:
            self._span.set_status(trace.StatusCode.ERROR, loggable(error))
            self._span.set_attribute("error.type", error.reason)
        self._span.end()
