"""Decode workers that compute nothing, in one process: registered as workers are, and speaking as they do (one stream for
a gateway, one message a step, gathered while it is not read), without an engine behind it, whose Python would cost more
than the gateway's that is measured.  A token's id says when it was drawn, as
a number, or with "words" as a word for those who read text.

python -m tests.bench.gateway.null_workers DIRECTORY MODEL WORKERS [words]

Steps take ``FIRST_STEP_S`` until a line on its input says how long; so streams open on a machine that is not busy yet.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any

import grpc

from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.model_files import open_model
from services.runtime import logs
from services.runtime.membership import Membership
from services.runtime.process import this_process
from services.runtime.server import bind, create_server, run_until_stopped, running
from services.worker.convert import to_layout_proto
from tests.bench.gateway.stamps import stamp
from tests.bench.gateway.words import Words

BLOCK_SIZE = 16
FIRST_STEP_S = 4.0
MAX_UNREAD_EVENTS = 65_536


class Pace:
    """How long a step takes, of all workers."""

    def __init__(self) -> None:
        self.step_s = FIRST_STEP_S

    def follow(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.step_s = float(line)

    async def step(self, place: float) -> None:
        """Until the next step's end.  ``place``: from 0 to 1, where in a step's time that is, so that workers do not all
        speak at once."""
        now_s = time.monotonic()
        await asyncio.sleep(self.step_s - (now_s - place * self.step_s) % self.step_s)


class NullDecode(worker_pb2_grpc.DecodeServiceServicer):
    def __init__(self, pace: Pace, place: float, stamp: Callable[[float], int]) -> None:
        self._pace = pace
        self._place = place
        self._stamp = stamp

    async def Decode(
        self, requests: AsyncIterator[worker_pb2.DecodeRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.DecodeResponse]:
        speaking = _Speaking(self._stamp)
        tasks = [
            asyncio.create_task(speaking.follow(requests)),
            asyncio.create_task(speaking.step(self._pace, self._place)),
        ]
        try:
            while True:
                yield await speaking.take()
        finally:
            for task in tasks:
                task.cancel()


class _Speaking:
    """One gateway's stream."""

    def __init__(self, stamp: Callable[[float], int]) -> None:
        self._stamp = stamp
        self._num_tokens: dict[int, int] = {}  # by handle
        self._max_tokens: dict[int, int] = {}
        self._unread = worker_pb2.DecodeResponse()
        self._drawn = asyncio.Event()

    async def follow(self, requests: AsyncIterator[worker_pb2.DecodeRequest]) -> None:
        async for request in requests:
            if request.WhichOneof("action") == "open":
                self._num_tokens[request.open.handle] = 0
                self._max_tokens[request.open.handle] = request.open.sampling.max_tokens
            else:
                self._forget(request.cancel.handle)

    def _forget(self, handle: int) -> None:
        self._num_tokens.pop(handle, None)
        self._max_tokens.pop(handle, None)

    async def step(self, pace: Pace, place: float) -> None:
        while True:
            await pace.step(place)
            if len(self._unread.events) > MAX_UNREAD_EVENTS:
                continue
            drawn = self._stamp(time.monotonic())
            ended = []
            for handle, index in self._num_tokens.items():
                token = common_pb2.Token(index=index, id=drawn)
                self._unread.events.append(worker_pb2.DecodeEvent(handle=handle, token=token))
                self._num_tokens[handle] = index + 1
                if index + 1 == self._max_tokens[handle]:
                    ended.append(handle)
            for handle in ended:
                finished = worker_pb2.DecodeFinished(reason=common_pb2.FINISH_REASON_LENGTH)
                self._unread.events.append(worker_pb2.DecodeEvent(handle=handle, finished=finished))
                self._forget(handle)
            self._drawn.set()

    async def take(self) -> worker_pb2.DecodeResponse:
        while not self._unread.events:
            self._drawn.clear()
            await self._drawn.wait()
        taken, self._unread = self._unread, worker_pb2.DecodeResponse()
        return taken


async def serve(directory: str, model: ModelConfig, num_workers: int, stamp: Callable[[float], int]) -> None:
    """Serves until cancelled."""
    async with AsyncExitStack() as stack:
        pace = Pace()
        threading.Thread(target=pace.follow, args=(sys.stdin,), daemon=True).start()
        for number in range(num_workers):
            server = create_server()
            address = f"127.0.0.1:{bind(server, '127.0.0.1:0')}"
            worker_pb2_grpc.add_DecodeServiceServicer_to_server(NullDecode(pace, number / num_workers, stamp), server)
            await stack.enter_async_context(running(server, grace_s=0))
            info = worker_info(f"null-{number}", address, model)
            await stack.enter_async_context(Membership((directory,), info, load, dict))
        print("ready", flush=True)
        await asyncio.Event().wait()


def worker_info(name: str, address: str, model: ModelConfig) -> directory_pb2.WorkerInfo:
    layout = KvLayout(
        model_revision=model.revision, dtype="float16", block_size=BLOCK_SIZE, num_layers=1, num_kv_heads=1, head_dim=1
    )
    return directory_pb2.WorkerInfo(
        worker_id=name,
        incarnation=time.time_ns(),
        role=common_pb2.WORKER_ROLE_DECODE,
        control_address=address,
        model=common_pb2.ModelInfo(
            name=model.name, revision=model.revision, context_length=model.context_length, vocab_size=model.vocab_size
        ),
        layout=to_layout_proto(layout),
        process=this_process().to_proto(),
    )


def load() -> directory_pb2.WorkerLoad:
    return directory_pb2.WorkerLoad(blocks=common_pb2.BlockCounts(free=1 << 20))


def main() -> int:
    directory, model, num_workers, *how = sys.argv[1:]
    logs.configure("null-workers", level="warning")
    files = open_model(model)
    work = serve(directory, files.config, int(num_workers), Words(files).id if how == ["words"] else stamp)
    return run_until_stopped(work, prog="null_workers")


if __name__ == "__main__":
    sys.exit(main())
