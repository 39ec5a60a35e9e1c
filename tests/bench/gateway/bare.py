"""grpc.aio and nothing else, as the peer of a gateway: one process whose streams are sent tokens at the pace of as many
workers, each token a message that was serialised before.  What a gateway of one message a token can reach at best.

python -m tests.bench.gateway.bare ADDRESS WORKERS

Its input sets the pace as it sets the null workers'.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator

import grpc

from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2
from services.runtime.server import bind, run_until_stopped, running
from tests.bench.gateway.null_workers import Pace
from tests.bench.gateway.stamps import stamp

SERVICE, METHOD = "kvferry.api.inference.v1.InferenceService", "Generate"


class Steps:
    """Speaks to its streams in turn, each ``1 / num_workers`` of them at once, and never waits for one."""

    def __init__(self, pace: Pace, num_workers: int) -> None:
        self._pace = pace
        self._unread: list[list[deque[bytes]]] = [[] for _ in range(num_workers)]
        self._come: list[list[asyncio.Event]] = [[] for _ in range(num_workers)]
        self._num_streams = 0

    async def stream(self, request: bytes, context: object) -> AsyncIterator[bytes]:
        worker = self._num_streams % len(self._unread)
        self._num_streams += 1
        unread, come = deque([_message()]), asyncio.Event()
        self._unread[worker].append(unread)
        self._come[worker].append(come)
        while True:
            while unread:
                yield unread.popleft()
            come.clear()
            await come.wait()

    async def run(self, worker: int) -> None:
        while True:
            await self._pace.step(worker / len(self._unread))
            message = _message()
            for unread, come in zip(self._unread[worker], self._come[worker], strict=True):
                unread.append(message)
                come.set()


def _message() -> bytes:
    token = common_pb2.Token(index=1, id=stamp(time.monotonic()))
    chunk = inference_pb2.Chunk(tokens=[token], text=" word")
    return inference_pb2.GenerateResponse(chunk=chunk).SerializeToString()


async def serve(address: str, num_workers: int) -> None:
    pace = Pace()
    threading.Thread(target=pace.follow, args=(sys.stdin,), daemon=True).start()
    steps = Steps(pace, num_workers)
    server = grpc.aio.server()
    handlers = {METHOD: grpc.unary_stream_rpc_method_handler(steps.stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    bind(server, address)
    async with running(server, grace_s=0), asyncio.TaskGroup() as speaking:
        for worker in range(num_workers):
            speaking.create_task(steps.run(worker))
        print("ready", flush=True)


def main() -> int:
    address, num_workers = sys.argv[1:]
    return run_until_stopped(serve(address, int(num_workers)), prog="bare")


if __name__ == "__main__":
    sys.exit(main())
