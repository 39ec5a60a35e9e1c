"""One call: what its handler sees of it, and how it ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, NoReturn, Protocol

import grpc
import structlog

from gateway.rpc import metadata
from gateway.rpc.framing import FramingError, Messages, TooLargeError
from kvferry.errors import DeadlineError

_log = structlog.stdlib.get_logger(__name__)

_Code = grpc.StatusCode
# A request that is one message must have come whole within so long of its head.
REQUEST_TIMEOUT_S = 30.0


class Wire(Protocol):
    """A connection, as a call sees it.  Nothing here waits."""

    def send_message(self, call: Call, message: bytes) -> None:
        """Now, or as the peer's windows open: then it is among the call's ``unsent`` until it is gone."""

    def end(self, call: Call, headers: list[tuple[str, str]]) -> None:
        """Sends the status: at once, or behind the rest of a message of which a part was sent."""

    def taken(self, call: Call) -> None:
        """What is buffered for it was read, and more may come."""

    @property
    def peer(self) -> str: ...


class Call:
    """Is its handler's context: as much of grpc.aio.ServicerContext as servicers here use.  Owned by the event loop."""

    def __init__(
        self, wire: Wire, stream_id: int, handler: Any, received: metadata.Metadata, *, timeout_s: float | None,
        write_timeout_s: float | None, max_message_nbytes: int,
    ) -> None:  # fmt: skip
        """``handler``: a grpc.RpcMethodHandler whose streaming behaviours write for themselves."""
        self.stream_id = stream_id
        self.begun = False  # whether a header was sent
        self.request_ended = False
        self.unsent: deque[memoryview] = deque()
        self.is_partly_sent = False  # the first of them
        self.last_headers: list[tuple[str, str]] | None = None  # to be sent behind them
        self.buffered_nbytes = 0  # its connection's count
        self.has_many_requests: bool = handler.request_streaming
        self._wire = wire
        self._handler = handler
        self._received = received
        self._timeout_s = timeout_s
        self._write_timeout_s = write_timeout_s
        self._messages = Messages(max_message_nbytes)
        self._requests: deque[bytes] = deque()
        self._broken: FramingError | None = None
        self._something_came = asyncio.Event()
        self._drained = asyncio.Event()
        self._status: tuple[grpc.StatusCode, str, metadata.Metadata] | None = None
        self._is_gone = False
        self.task = asyncio.create_task(self._run())

    # As a grpc.aio.ServicerContext.

    def invocation_metadata(self) -> metadata.Metadata:
        return self._received

    def peer(self) -> str:
        return self._wire.peer

    async def write(self, response: Any) -> None:
        """Returns when it has been handed to the connection, or to the client's window where that is shut.  Raises
        DeadlineError (CLIENT_TOO_SLOW) when the client takes nothing for as long as it may."""
        if not self.send(response):
            await self.drained()

    # As an Outlet, for who has much to send.

    def send(self, response: Any) -> bool:
        """False where the client's window is shut, or its connection full: it is kept until there is room."""
        self._wire.send_message(self, self._handler.response_serializer(response))
        return not self.unsent

    async def drained(self) -> None:
        """Raises as ``write`` does."""
        self._drained.clear()
        if not self.unsent:
            return
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._drained.wait()
        except TimeoutError:
            text = f"no response was taken for {self._write_timeout_s} s"
            raise DeadlineError(text, reason="CLIENT_TOO_SLOW") from None

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: metadata.Metadata | None = ()
    ) -> NoReturn:
        self._status = (code, details, trailing_metadata or ())
        raise grpc.aio.AbortError(details)

    # As its connection sees it.

    def on_data(self, data: bytes) -> None:
        try:
            self._requests += self._messages.feed(data)
        except FramingError as error:
            self._broken = error
        self._something_came.set()

    def on_request_end(self) -> None:
        self.request_ended = True
        self._something_came.set()

    def on_drained(self) -> None:
        self._drained.set()

    def on_gone(self) -> None:
        """Reset by the client, or lost with its connection: nobody hears its end."""
        self._is_gone = True
        self.task.cancel()

    async def _run(self) -> None:
        scope = asyncio.timeout(self._timeout_s)
        try:
            async with scope:
                await self._handle()
            self._end(_Code.OK)
        except asyncio.CancelledError:  # by the server's stop, or by a client that hears nothing any more
            self._end(_Code.UNAVAILABLE, "the server is shutting down")
        except TimeoutError:
            if scope.expired():
                self._end(_Code.DEADLINE_EXCEEDED, "the call's time ran out")
            else:
                self._end(_Code.INTERNAL, "internal error")
        except grpc.aio.AbortError:
            assert self._status is not None
            self._end(*self._status)
        except Exception:
            _log.exception("call failed")
            self._end(_Code.INTERNAL, "internal error; the service's log has the details")

    async def _handle(self) -> None:
        handler = self._handler
        try:
            request = self._decoded() if self.has_many_requests else await self._only_request()
        except FramingError as error:
            code = _Code.RESOURCE_EXHAUSTED if isinstance(error, TooLargeError) else _Code.UNIMPLEMENTED
            await self.abort(code, str(error))
        if handler.response_streaming:
            behaviour = handler.stream_stream if self.has_many_requests else handler.unary_stream
            await behaviour(request, self)
        else:
            behaviour = handler.stream_unary if self.has_many_requests else handler.unary_unary
            await self.write(await behaviour(request, self))

    async def _only_request(self) -> Any:
        with suppress(TimeoutError):
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                while not self.request_ended and self._broken is None:
                    self._something_came.clear()
                    await self._something_came.wait()
        if self._broken is not None:
            raise self._broken
        if not self.request_ended:
            await self.abort(_Code.DEADLINE_EXCEEDED, f"the request did not come within {REQUEST_TIMEOUT_S:g} s")
        if len(self._requests) != 1 or self._messages.nbytes:
            await self.abort(_Code.INVALID_ARGUMENT, "the method takes one message, whole")
        self._wire.taken(self)
        return self._handler.request_deserializer(self._requests.popleft())

    async def _decoded(self) -> AsyncIterator[Any]:
        while True:
            while self._requests:
                message = self._requests.popleft()
                yield self._handler.request_deserializer(message)
            self._wire.taken(self)
            if self._broken is not None:
                await self.abort(_Code.UNIMPLEMENTED, str(self._broken))
            if self.request_ended:
                return
            self._something_came.clear()
            await self._something_came.wait()

    def _end(self, code: grpc.StatusCode, details: str = "", trailing: metadata.Metadata = ()) -> None:
        if self._is_gone:
            return
        number: int = code.value[0]
        headers = [("grpc-status", str(number))]
        if details:
            headers.append(("grpc-message", metadata.percent_encoded(details)))
        self._wire.end(self, headers + metadata.outgoing(trailing))
