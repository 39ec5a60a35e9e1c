"""A decode worker that plays what a test says, on a real gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc


class Played(worker_pb2_grpc.DecodeServiceServicer):
    """Says what it is told to; hands out what it was sent."""

    def __init__(self) -> None:
        self.sent = asyncio.Queue[worker_pb2.DecodeRequest]()
        self.num_streams = 0
        self._to_say: asyncio.Queue[worker_pb2.DecodeResponse | grpc.StatusCode] = asyncio.Queue()

    async def Decode(self, requests: Any, context: Any) -> AsyncIterator[worker_pb2.DecodeResponse]:
        self.num_streams += 1

        async def follow() -> None:
            async for request in requests:
                self.sent.put_nowait(request)

        following = asyncio.create_task(follow())
        try:
            while not isinstance(response := await self._to_say.get(), grpc.StatusCode):
                yield response
            await context.abort(response, "gone")
        finally:
            following.cancel()

    def say(self, *events: worker_pb2.DecodeEvent) -> None:
        self._to_say.put_nowait(worker_pb2.DecodeResponse(events=events))

    @property
    def num_left_to_say(self) -> int:
        return self._to_say.qsize()

    def vanish(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self._to_say.put_nowait(code)


@asynccontextmanager
async def playing() -> AsyncIterator[tuple[Played, str]]:
    """With the address; everything within has 20 s."""
    server = grpc.aio.server()
    played = Played()
    worker_pb2_grpc.add_DecodeServiceServicer_to_server(played, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with asyncio.timeout(20):
        yield played, f"127.0.0.1:{port}"
    await server.stop(None)


def token(handle: int, index: int) -> worker_pb2.DecodeEvent:
    return worker_pb2.DecodeEvent(handle=handle, token=common_pb2.Token(index=index))
