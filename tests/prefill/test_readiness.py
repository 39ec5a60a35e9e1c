"""Chunks that a device still computes when its step has returned: their KV is written once it is in memory, no sooner, and
while the next chunk is computed."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.errors import AbortedError, ConflictError
from services.engine.batch import Batch
from services.engine.sampling_params import DrawFailed, Drawn
from services.prefill.readiness import reached
from tests.engine.fake_device import FakeMark
from tests.prefill.two_workers import MadeUpRunner, TwoWorkers, layout, sampling, token_kv, two_workers

OWN = layout("float32", 4)
PROMPT = tuple(range(30))  # a chunk that draws nothing, and one that does


class EarlyRunner(MadeUpRunner):
    """Returns from what draws nothing with nothing computed: that happens when its mark is reached, by the next run too.
    That one waits for ``may_draw``."""

    def __init__(self, pool: torch.Tensor) -> None:
        super().__init__(pool)
        self.marks: list[FakeMark] = []
        self.may_draw = threading.Event()

    def run(self, batch: Batch) -> list[Drawn | DrawFailed | None]:
        compute = partial(super().run, batch)
        if not batch.samples:
            self.ready = FakeMark(compute)
            self.marks.append(self.ready)
            return []
        assert self.may_draw.wait(30)
        for mark in self.marks:
            if not mark.done():
                mark.wait()
        self.ready = None
        return compute()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def make_early(workers: TwoWorkers) -> EarlyRunner:
    runner = EarlyRunner(workers.writer.pools)
    workers.writer.worker.engine._runner = runner
    return runner


async def test_a_chunk_is_written_when_it_is_in_memory_and_before_the_next_is_computed() -> None:
    async with two_workers(OWN, OWN) as workers:
        runner = make_early(workers)
        transport = workers.writer.worker.transport
        async with workers.ticket(PROMPT) as (ticket, call):
            ferrying = asyncio.ensure_future(_collect(workers.ferries.run(list(PROMPT), sampling(), ticket, b"salt")))
            await until(lambda: runner.marks)
            await asyncio.sleep(0.05)
            assert transport.counters().num_posted == 0
            runner.marks[0].wait()
            await until(lambda: transport.counters().num_succeeded == 1)
            runner.may_draw.set()
            await ferrying
            expected = torch.stack([token_kv(token, at) for at, token in enumerate(PROMPT)])
            assert torch.equal(workers.owner.kv(ticket.blocks, len(PROMPT)), expected)
            assert (await call.read()).token.id == 7
            assert (await call.read()).HasField("finished")
        await workers.quiet()


async def test_what_the_device_fails_with_fails_the_write() -> None:
    async with two_workers(OWN, OWN) as workers:
        runner = make_early(workers)
        async with workers.ticket(PROMPT) as (ticket, _):
            ferrying = asyncio.ensure_future(_collect(workers.ferries.run(list(PROMPT), sampling(), ticket, b"salt")))
            await until(lambda: runner.marks)

            def broken() -> bool:
                raise RuntimeError("an illegal memory access was encountered")

            runner.marks[0].done = broken  # type: ignore[method-assign]
            with pytest.raises(AbortedError, match="illegal memory access"):
                await ferrying
            del runner.marks[0].done  # type: ignore[method-assign]
            runner.may_draw.set()
        await until(workers.writer.worker.is_idle)


async def test_a_device_that_never_gets_there_is_given_up() -> None:
    with pytest.raises(TimeoutError):
        await reached(FakeMark(lambda: None), timeout_s=0.01)


async def _collect(items: Any) -> list[Any]:
    return [item async for item in items]


async def test_a_pool_on_a_gpu_is_not_converted() -> None:
    async with two_workers(OWN, layout("bfloat16", 4)) as workers:
        region = workers.writer.worker.region
        region._device = SimpleNamespace(device=0)
        async with workers.ticket(PROMPT) as (ticket, _):
            with pytest.raises(ConflictError, match="start both workers with the same --block-size and --dtype"):
                await _collect(workers.ferries.run(list(PROMPT), sampling(), ticket, b"salt"))
        region._device = None
        assert workers.writer.worker.is_idle()
