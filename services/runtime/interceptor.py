"""What stands between gRPC and every handler: decoding, error mapping, request context."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import structlog
from opentelemetry import trace

from kvferry import errors
from services.runtime import tracing
from services.runtime.handlers import rebuilt
from services.runtime.logs import loggable

_log = structlog.stdlib.get_logger(__name__)

_Handler = Any  # grpc.RpcMethodHandler; its attributes are not in the type stubs
_Context = Any  # grpc.aio.ServicerContext, of any request and response


class _Malformed:
    """Stands for a request that could not be decoded.  gRPC would answer UNKNOWN if the deserializer raised."""


_MALFORMED = _Malformed()


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler so that

    - request bytes that do not decode end the call with INVALID_ARGUMENT, reason MALFORMED_MESSAGE;
    - a kvferry.errors.Error, raised before or in the middle of a stream, becomes its status;
    - any other exception is logged with its traceback and becomes INTERNAL, its text kept from the caller;
    - cancellation and context.abort() pass through;
    - a streaming handler is closed as soon as its call ends, also when it was suspended at a yield;
    - request id and trace context of the caller hold within the handler.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        handler = await continuation(handler_call_details)
        return handler if handler is None else with_errors_mapped(handler, handler_call_details.method)


def with_errors_mapped(handler: _Handler, method: str) -> _Handler:
    """``handler`` as RequestInterceptor has it."""
    return rebuilt(
        handler,
        lambda given: _unary(given, method),
        lambda given: _streaming(given, method),
        _tolerant,
    )


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:
            return _MALFORMED

    return decode


def _unary(behaviour: Callable[[Any, _Context], Awaitable[Any]], method: str) -> Callable[[Any, _Context], Any]:
    async def handle(request: Any, context: _Context) -> Any:
        async with _Scope(method, context):
            return await behaviour(_decoded(request, method), context)

    return handle


def _streaming(behaviour: Callable[[Any, _Context], Any], method: str) -> Callable[[Any, _Context], Awaitable[None]]:
    # Writes by itself instead of being a generator: gRPC would leave a generator that is suspended at a yield when its
    # call is cancelled to the garbage collector, and what it holds with it.
    async def handle(request: Any, context: _Context) -> None:
        async with _Scope(method, context):
            responses = behaviour(_decoded(request, method), context)
            if not hasattr(responses, "__aiter__"):
                await responses
                return
            async with aclosing(responses):
                async for response in responses:
                    await context.write(response)

    return handle


def _decoded(request: Any, method: str) -> Any:
    if request is _MALFORMED:
        raise _malformed(method)
    return _decoded_each(request, method) if hasattr(request, "__aiter__") else request


async def _decoded_each(requests: AsyncIterator[Any], method: str) -> AsyncIterator[Any]:
    async for request in requests:
        if request is _MALFORMED:
            raise _malformed(method)
        yield request


def _malformed(method: str) -> errors.Error:
    return errors.InvalidRequestError(
        f"the request is not a valid protobuf message for {method}", reason="MALFORMED_MESSAGE"
    )


class _Scope:
    """One call: its span, its ids, and what becomes of an exception."""

    def __init__(self, method: str, context: _Context) -> None:
        self._method = method
        self._context = context

    async def __aenter__(self) -> None:
        request_id, parent = tracing.incoming_context(self._context.invocation_metadata() or ())
        # Each call has a task of its own, so what is bound here needs no unbinding.
        structlog.contextvars.clear_contextvars()
        if request_id is not None:
            tracing.bind_request_id(request_id)
        name = self._method.lstrip("/")
        self._span_scope = tracing.tracer().start_as_current_span(
            name,
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.method": name},
            record_exception=False,
            set_status_on_exception=False,
        )
        self._span = self._span_scope.__enter__()

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if isinstance(error, errors.Error):
                await self._abort(error)
            elif isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
                _log.error("handler failed", method=self._method, exc_info=error)
                request_id = tracing.current_request_id()
                hint = f"the service's log has the details under request_id {request_id}" if request_id else ""
                await self._abort(
                    errors.InternalError("internal error; " + (hint or "the service's log has the details"))
                )
        finally:
            self._span_scope.__exit__(None, None, None)

    async def _abort(self, error: errors.Error) -> None:
        self._span.set_status(trace.StatusCode.ERROR, loggable(error))
        self._span.set_attribute("error.type", error.reason)
        status = errors.to_status(error)
        await self._context.abort(status.code, status.details, status.trailing_metadata)
