"""What surrounds every request: its id, its trace, and an answer for exceptions that nobody foresaw."""

from __future__ import annotations

import uuid

import structlog
from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.errors import error_response, internal_error
from services.runtime import tracing

_log = structlog.stdlib.get_logger(__name__)


class RequestScope:
    """Middleware.  The id is the caller's x-request-id, or a new one where that is missing or no request id; it goes
    into the scope's state, every log line and the response.  A traceparent is joined."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "the server runs with lifespan and websockets off"
        given, parent = tracing.incoming_context(Headers(scope=scope).items())
        request_id = given or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)[tracing.REQUEST_ID_KEY] = request_id
            await send(message)

        span = tracing.tracer().start_as_current_span(
            f"HTTP {scope['method']}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes={"url.path": scope["path"]},
        )
        with structlog.contextvars.bound_contextvars(request_id=request_id), span:
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                _log.exception("request failed", path=scope["path"])
                # A response that has begun can only be broken off, which the server does when nothing completes it.
                if not begun:
                    await error_response(internal_error(request_id))(scope, receive, send_with_id)
