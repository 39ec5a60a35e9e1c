"""A client of a dispatcher that reads when a test tells it to."""

from __future__ import annotations

import asyncio

from gateway.dispatch import Dispatcher
from gateway.job import Job, Trace
from kvferry.api.common.v1 import common_pb2


class Reading:
    """One request, begun with the first read.  Has room for more only while it is being read; who gives a read up, or
    closes it, gives the request up."""

    def __init__(self, dispatcher: Dispatcher, job: Job, timeout_s: float, trace: Trace | None = None) -> None:
        self._request = dispatcher.run(job, trace or Trace(), timeout_s, self)
        self._running: asyncio.Task[None] | None = None
        self._tokens: list[common_pb2.Token] = []
        self._came = asyncio.Event()
        self._is_reading = asyncio.Event()

    def put(self, tokens: list[common_pb2.Token]) -> bool:
        assert not self._tokens, "it had no room"
        self._tokens = tokens
        self._came.set()
        self._is_reading.clear()
        return False

    async def room(self) -> bool:
        await self._is_reading.wait()
        return True

    async def __anext__(self) -> list[common_pb2.Token]:
        self._is_reading.set()
        if self._running is None:
            self._running = asyncio.create_task(self._request)
        coming = asyncio.create_task(self._came.wait())
        try:
            await asyncio.wait((coming, self._running), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self.aclose()
            raise
        finally:
            coming.cancel()
        if not self._tokens:
            self._running.result()
            raise StopAsyncIteration
        tokens, self._tokens = self._tokens, []
        self._came.clear()
        return tokens

    async def aclose(self) -> None:
        if self._running is None:
            self._request.close()
            return
        self._running.cancel()
        await asyncio.wait((self._running,))
        if not self._running.cancelled():
            self._running.exception()  # has been heard of
