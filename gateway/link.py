"""This gateway's stream to each decode worker: one for all requests that it has there."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

import grpc
import structlog

from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import Error, InternalError, UnavailableError, from_rpc_error
from services.runtime.backoff import Backoff
from services.runtime.channels import Channels

log = structlog.get_logger(__name__)

_LAST = ("finished", "failure")


class Listener(Protocol):
    """One request on a link; called in the event loop, must neither block nor raise."""

    def on_event(self, kind: str | None, event: worker_pb2.DecodeEvent) -> None:
        """What the worker says of it, in order; a finished or a failure is the last.  ``kind`` is the field that is set."""

    def on_lost(self, error: Error) -> None:
        """The stream was lost, and the request with it: nothing more comes."""


class DecodeLink:
    """One worker's address.  The stream begins with the first request and stays until it is lost; the next request then
    begins another, unless that was so shortly before that it is refused.  Owned by the event loop."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = worker_pb2_grpc.DecodeServiceStub(channel)
        self._listeners: dict[int, Listener] = {}
        self._last_handle = 0
        self._outgoing: deque[worker_pb2.DecodeRequest] = deque()
        self._something_to_send = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._backoff = Backoff()
        self._refused_until_s = 0.0

    def open(self, request: worker_pb2.DecodeOpen, listener: Listener) -> int:
        """Sends the request under a handle of its own, which is returned.  Raises UnavailableError shortly after the
        stream was lost."""
        if self._serving is None:
            if time.monotonic() < self._refused_until_s:
                raise UnavailableError("its stream was lost a moment ago")
            # In no context: what is said on the stream belongs to no request more than to another.
            self._serving = asyncio.create_task(self._serve(), context=contextvars.Context())
        self._last_handle += 1
        request.handle = self._last_handle
        self._listeners[request.handle] = listener
        self._send(worker_pb2.DecodeRequest(open=request))
        return request.handle

    def cancel(self, handle: int) -> None:
        """The listener hears no more.  Does nothing for a request that has ended."""
        if self._listeners.pop(handle, None) is not None:
            self._send(worker_pb2.DecodeRequest(cancel=worker_pb2.DecodeCancel(handle=handle)))

    async def aclose(self) -> None:
        """Ends the stream, and with it every request on it."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])

    def _send(self, request: worker_pb2.DecodeRequest) -> None:
        self._outgoing.append(request)
        self._something_to_send.set()

    async def _serve(self) -> None:
        error: Error = UnavailableError("it ended its stream")
        call = self._stub.Decode()
        writing = asyncio.create_task(self._write(call))
        try:
            while isinstance(response := await call.read(), worker_pb2.DecodeResponse):  # not EOF
                self._backoff.reset()
                for event in response.events:
                    self._deliver(event)
        except grpc.aio.AioRpcError as e:
            error = from_rpc_error(e)
        except Exception as e:
            log.exception("link_broke")
            error = InternalError(f"the gateway failed to follow a worker's stream: {type(e).__name__}")
        finally:
            call.cancel()
            writing.cancel()
            self._lose(error)
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # whoever reads is told why
            while True:
                await self._something_to_send.wait()
                self._something_to_send.clear()
                while self._outgoing:
                    await call.write(self._outgoing.popleft())

    def _deliver(self, event: worker_pb2.DecodeEvent) -> None:
        listener = self._listeners.get(event.handle)
        if listener is None:  # cancelled
            return
        kind = event.WhichOneof("event")
        if kind in _LAST:
            del self._listeners[event.handle]
        listener.on_event(kind, event)

    def _lose(self, error: Error) -> None:
        self._serving = None
        self._refused_until_s = time.monotonic() + self._backoff.next_s()
        self._outgoing.clear()
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.on_lost(error)


class DecodeLinks:
    """A link for each address, however many callers.  Ends them all on leaving the context."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._links: dict[str, DecodeLink] = {}

    def get(self, address: str) -> DecodeLink:
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = DecodeLink(self._channels.get(address))
        return link

    async def __aenter__(self) -> DecodeLinks:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.gather(*(link.aclose() for link in self._links.values()))
