"""Decode workers that compute nothing, in one process: everything of a worker is real but the model and the pool's size.
A token's id says when it was drawn.

python -m tests.bench.gateway.null_engine DIRECTORY MODEL WORKERS STREAMS

Steps take ``FIRST_STEP_S`` until a line on its input says how long; so streams open on a machine that is not busy yet.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack, closing

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2_grpc
from services.decode.reservations import Reservations, Terms
from services.decode.servicer import DecodeServicer
from services.engine.batch import Batch
from services.engine.blocks import BlockPool
from services.engine.engine import Engine
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.model_files import open_model
from services.engine.sampling_params import DrawFailed, Drawn
from services.engine.scheduler import Limits, Scheduler
from services.engine.steps import Blocking, Draws
from services.runtime import logs
from services.runtime.channels import Channels
from services.runtime.membership import Membership
from services.runtime.process import this_process
from services.runtime.server import bind, create_server, run_until_stopped, running
from services.worker.digester import Digester
from services.worker.events import EventRouter
from services.worker.pins import PinBook
from services.worker.share import Share
from services.worker.worker import Identity, Worker
from tests.bench.gateway.stamps import stamp
from transport import create

BLOCK_SIZE = 16
FIRST_STEP_S = 4.0


class Pace:
    """How long a step takes, of all workers."""

    def __init__(self) -> None:
        self.step_s = FIRST_STEP_S

    def follow(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.step_s = float(line)


class Paced:
    """A step takes as long as it is told to, whoever is in it."""

    runs_ahead = False

    def __init__(self, pace: Pace, place: float) -> None:
        """``place``: from 0 to 1, where in a step's time its steps begin, so that workers do not all speak at once."""
        self._pace = pace
        self._place = place
        self._never = threading.Event()

    def start(self, batch: Batch) -> Blocking:
        return Blocking(lambda: self.run(batch))

    def run(self, batch: Batch) -> Draws:
        step_s, now_s = self._pace.step_s, time.monotonic()
        self._never.wait(step_s - (now_s - self._place * step_s) % step_s)
        drawn: Drawn | DrawFailed | None = Drawn(stamp(time.monotonic()))
        return [drawn] * len(batch.samples)


async def serve(directory: str, model: ModelConfig, num_workers: int, num_streams: int) -> None:
    """Serves until cancelled.  ``num_streams`` at a time on each worker."""
    async with AsyncExitStack() as stack:
        pace = Pace()
        threading.Thread(target=pace.follow, args=(sys.stdin,), daemon=True).start()
        for number in range(num_workers):
            runner = Paced(pace, number / num_workers)
            await serve_one(stack, directory, model, f"null-{number}", num_streams, runner)
        print("ready", flush=True)
        await asyncio.Event().wait()


async def serve_one(
    stack: AsyncExitStack, directory: str, model: ModelConfig, name: str, num_streams: int, runner: Paced
) -> None:
    num_blocks = num_streams * (model.context_length // BLOCK_SIZE)
    layout = KvLayout(
        model_revision=model.revision, dtype="float16", block_size=BLOCK_SIZE, num_layers=1, num_kv_heads=1, head_dim=1
    )
    transport = stack.enter_context(create("loopback"))
    pool = BlockPool(num_blocks)
    limits = Limits(
        block_size=BLOCK_SIZE, context_length=model.context_length, max_step_tokens=1 << 16,
        max_running=num_streams, max_waiting=num_streams,
    )  # fmt: skip
    router = EventRouter(asyncio.get_running_loop())
    engine = stack.enter_context(closing(Engine(Scheduler(pool, limits), runner, router)))
    server = create_server()
    address = f"127.0.0.1:{bind(server, '127.0.0.1:0')}"
    identity = Identity(name, time.time_ns(), common_pb2.WORKER_ROLE_DECODE, address, this_process())
    region = transport.allocate(num_blocks * layout.block_nbytes)
    pins = PinBook(pool, max_blocks=1, max_pins=1)
    worker = Worker(identity, model, layout, transport, region, engine, router, pins)
    channels = await stack.enter_async_context(Channels())
    digester = stack.enter_context(Digester(worker))
    reservations = await stack.enter_async_context(
        Reservations(worker, channels, digester, Terms(60.0, Share.parse("none"), 60.0))
    )
    worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(worker, reservations), server)
    engine.start()
    await stack.enter_async_context(running(server, grace_s=0))
    # What its cache holds is not published: the bench is of tokens, not of the index.
    await stack.enter_async_context(Membership(directory, worker.info(), worker.load, list))


def main() -> int:
    directory, model, num_workers, num_streams = sys.argv[1:]
    logs.configure("null-engine", level="warning")
    config = open_model(model).config
    work = serve(directory, config, int(num_workers), int(num_streams))
    return run_until_stopped(work, prog="null_engine")


if __name__ == "__main__":
    sys.exit(main())
