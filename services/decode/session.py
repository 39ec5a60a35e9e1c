"""One gateway's stream to this worker: its requests, and what they have to say until it is sent."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import structlog

from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import Error, InternalError, InvalidRequestError, OverloadedError
from services.decode.convert import to_finished_proto, to_ticket_proto, to_writer
from services.decode.reservations import DecodeStream, Finished, News, Reservations
from services.engine.sequence import TokenDrawn
from services.runtime.failure import to_failure
from services.runtime.tracing import RequestScope
from services.worker.convert import to_finish_reason, to_source, to_token
from services.worker.worker import Worker

log = structlog.get_logger(__name__)

SPAN_NAME = "kvferry.api.worker.v1.DecodeService/Decode"
# What a gateway may leave unread: seconds of a fast worker's tokens, some megabytes.
MAX_UNREAD_EVENTS = 65_536
# Keeps a message far below what gRPC takes, also where events are tickets or tokens with alternatives.
MAX_EVENTS_IN_MESSAGE = 2_048


@dataclass(slots=True, eq=False)
class _Request:
    handle: int
    scope: RequestScope
    stream: DecodeStream | None = None


class Session:
    """Owned by the event loop.  One task follows the gateway's messages, one sends ``responses``; whoever began them must
    ``close`` the session in the end."""

    def __init__(
        self, worker: Worker, reservations: Reservations, *, max_unread_events: int = MAX_UNREAD_EVENTS
    ) -> None:
        """A gateway that leaves more than ``max_unread_events`` unread loses the session."""
        self._worker = worker
        self._reservations = reservations
        self._max_unread_events = max_unread_events
        self._requests: dict[int, _Request] = {}
        self._last_handle = -1
        self._unread: deque[worker_pb2.DecodeResponse] = deque()
        self._num_unread = 0
        self._ending = False
        self._broken: Exception | None = None
        self._changed = asyncio.Event()

    async def follow(self, requests: AsyncIterator[worker_pb2.DecodeRequest]) -> None:
        """Returns when the gateway has ended its side or lost the session; ``responses`` raises what is wrong."""
        try:
            async for request in requests:
                if request.WhichOneof("action") == "open":
                    self._open(request.open)
                else:
                    self._end(request.cancel.handle)
                if self._broken:
                    return
        except Exception as e:
            self._broken = self._broken or e
        self.end()

    async def responses(self) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        """What there is to say, gathered since the message before was taken.  Ends when ``end`` was called and the last
        request has ended.  Raises InvalidRequestError, OverloadedError or what reading raised."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._unread:
                response = self._unread.popleft()
                self._num_unread -= len(response.events)
                yield response
            if self._broken is not None:
                raise self._broken
            if self._ending and not self._requests:
                return

    def end(self) -> None:
        """The session ends with its last request."""
        self._ending = True
        self._changed.set()

    def close(self) -> None:
        """Cancels what is left."""
        for handle in list(self._requests):
            self._end(handle)

    def _open(self, message: worker_pb2.DecodeOpen) -> None:
        if message.handle <= self._last_handle:
            raise InvalidRequestError(f"handle {message.handle} is not above the one before, {self._last_handle}")
        self._last_handle = message.handle
        request = _Request(message.handle, RequestScope(SPAN_NAME, message.context.items()))
        self._requests[request.handle] = request
        try:
            request.stream = request.scope.run(self._begin, request, message)
        except Error as e:
            self._fail(request, e)
        except Exception:
            request.scope.run(log.exception, "request_failed")
            self._fail(request, InternalError("internal error; the service's log has the details"))

    def _begin(self, request: _Request, message: worker_pb2.DecodeOpen) -> DecodeStream:
        stream = self._reservations.open(
            message.request_id, list(message.prompt_token_ids), message.sampling, message.cache_salt,
            to_writer(message.writer) if message.HasField("writer") else None,
            lambda news: self._tell(request, news),
            to_source(message.pull) if message.HasField("pull") else None,
        )  # fmt: skip
        if stream.ticket is not None:
            self._event(request).ticket.CopyFrom(to_ticket_proto(stream.ticket, stream, self._worker))
        return stream

    def _tell(self, request: _Request, news: News) -> None:
        match news:
            case TokenDrawn(index=index, drawn=drawn):
                self._event(request).token.CopyFrom(to_token(index, drawn))
            case Finished(reason=reason):
                assert request.stream is not None
                finished = to_finished_proto(request.stream, to_finish_reason(reason))
                tokens = request.stream.sequence.num_output
                request.scope.run(log.info, "decoded", tokens=tokens, steps=finished.decode.num_steps)
                self._event(request).finished.CopyFrom(finished)
                self._end(request.handle)
            case error:
                self._fail(request, error)

    def _fail(self, request: _Request, error: Error) -> None:
        self._event(request).failure.CopyFrom(to_failure(error))
        self._end(request.handle, error)

    def _event(self, request: _Request) -> worker_pb2.DecodeEvent:
        if not self._unread or len(self._unread[-1].events) >= MAX_EVENTS_IN_MESSAGE:
            self._unread.append(worker_pb2.DecodeResponse())
        self._num_unread += 1
        self._changed.set()
        if self._num_unread > self._max_unread_events and self._broken is None:
            asyncio.get_running_loop().call_soon(self._lose)  # not now: the caller goes through requests
            self._broken = OverloadedError(f"{self._max_unread_events} events wait to be read", reason="NOT_READ")
        return self._unread[-1].events.add(handle=request.handle)

    def _lose(self) -> None:
        """Its requests will never be heard: nothing more is computed or kept for them."""
        log.warning("gateway_does_not_read", requests=len(self._requests), events=self._num_unread)
        self.close()
        self._unread.clear()
        self._num_unread = 0

    def _end(self, handle: int, error: Error | None = None) -> None:
        request = self._requests.pop(handle, None)
        if request is None:
            return
        if request.stream is not None:
            request.scope.run(self._reservations.close, request.stream)
        request.scope.end(error)
        if not self._requests:
            self._changed.set()
