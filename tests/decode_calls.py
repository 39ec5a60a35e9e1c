"""One request to a decode worker, on a stream of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import from_rpc_error
from services.runtime.failure import from_failure


class DecodeCall:
    """From ``channel`` of grpc.aio.  What ends it otherwise than with a finished is raised as kvferry.Error."""

    def __init__(self, channel: grpc.aio.Channel, request: worker_pb2.DecodeOpen, timeout_s: float) -> None:
        stub = worker_pb2_grpc.DecodeServiceStub(channel)
        self._call = stub.Decode(iter([worker_pb2.DecodeRequest(open=request)]), timeout=timeout_s)
        self._events: deque[worker_pb2.DecodeEvent] = deque()

    async def read(self) -> worker_pb2.DecodeEvent | None:
        """None at the end."""
        while not self._events:
            try:
                response: Any = await self._call.read()
            except grpc.aio.AioRpcError as e:
                raise from_rpc_error(e) from e
            if response is grpc.aio.EOF:
                return None
            self._events.extend(response.events)
        return _or_error(self._events.popleft())

    async def next(self) -> worker_pb2.DecodeEvent:
        event = await self.read()
        assert event is not None
        return event

    async def __aiter__(self) -> AsyncIterator[worker_pb2.DecodeEvent]:
        while (event := await self.read()) is not None:
            yield event

    def cancel(self) -> None:
        self._call.cancel()


class BlockingDecodeCall:
    """The same from a channel of grpc.  An iterator of events."""

    def __init__(self, channel: grpc.Channel, request: worker_pb2.DecodeOpen, timeout_s: float) -> None:
        stub = worker_pb2_grpc.DecodeServiceStub(channel)
        self._call = stub.Decode(iter([worker_pb2.DecodeRequest(open=request)]), timeout=timeout_s)
        self._events: deque[worker_pb2.DecodeEvent] = deque()

    def __iter__(self) -> Iterator[worker_pb2.DecodeEvent]:
        return self

    def __next__(self) -> worker_pb2.DecodeEvent:
        while not self._events:
            try:
                self._events.extend(next(self._call).events)
            except grpc.RpcError as e:
                raise from_rpc_error(e) from e
        return _or_error(self._events.popleft())

    def cancel(self) -> None:
        self._call.cancel()


def _or_error(event: worker_pb2.DecodeEvent) -> worker_pb2.DecodeEvent:
    if event.HasField("failure"):
        raise from_failure(event.failure)
    return event
