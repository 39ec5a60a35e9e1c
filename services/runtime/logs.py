"""Structured logs on stderr: readable on a terminal, one JSON object per line elsewhere."""

from __future__ import annotations

import logging
import sys
from enum import Enum

import structlog
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

from kvferry.errors import Error, InvalidRequestError, NotFoundError


def loggable(error: Error) -> str:
    """What logs and spans may say of an error: its words, but where these quote what a client sent, the field alone."""
    if not isinstance(error, InvalidRequestError | NotFoundError):
        return error.message
    field = error.metadata.get("field")
    return f"the request was wrong in {field}" if field else "the request was wrong"


class LogLevel(Enum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def configure(service: str, *, level: str = "info", json: bool | None = None) -> None:
    """Sends structlog and stdlib logging (grpc, uvicorn, ...) through one chain to stderr.  ``json`` None means JSON
    unless stderr is a terminal.  Every line carries the service's name, what is bound in structlog's contextvars
    (request_id), and the current trace_id.  May be called again; the last call counts."""
    if json is None:
        json = not sys.stderr.isatty()

    def add_origin(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            event.setdefault("trace_id", trace.format_trace_id(context.trace_id))
        return event

    chain: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_origin,
    ]
    # The exception formatter is the plain one: rich's shows local variables, and those hold prompts.
    ends: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if json
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *chain,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*chain, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ends],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    # At debug asyncio and friends drown what the operator asked for, and HTTP's tell heads of requests: keys, and prompts.
    for name in ("asyncio", "grpc", "h11", "hpack", "httpcore", "hyperframe", "urllib3", "filelock"):
        logging.getLogger(name).setLevel(max(logging.INFO, root.level))
