"""Pulls between two workers of one process, whose reads end when the test says so: the made-up model's KV is known, and
so is what should be in any block."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.engine.sequence import Sequence as EngineSequence
from services.runtime.channels import Channels
from services.runtime.server import create_server
from services.worker import puller as puller_module
from services.worker.holdings import Holdings
from services.worker.pull_terms import Outcome, PullReport, Source
from services.worker.puller import MAX_PULL_S, Puller
from services.worker.pulls import MAX_PULLS
from services.worker.servicer import WorkerServicer
from tests.prefill.two_workers import NUM_BLOCKS, Side, layout, side, token_kv
from transport import Op, Path, PeerLost, RemoteRegion, Transfer, TransferCancelled, TransferResult

BLOCK = 4
PROMPT = list(range(17))  # four full blocks, as many as may be pinned, and the token that is always computed
LONG_S = 20.0


@dataclass(slots=True)
class Reads:
    """In the place of the puller's transport.  ``held``: reads move nothing and do not end before the test says so."""

    transport: Any
    held: bool = False
    begun: list[tuple[Transfer, Callable[[], Awaitable[None]]]] = field(default_factory=list)
    num_cancels: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def post(self, op: Op, *arguments: Any) -> Transfer:
        if op is not Op.READ or not self.held:
            return self.transport.post(op, *arguments)  # type: ignore[no-any-return]

        async def move() -> None:
            await self.transport.post(op, *arguments)

        def cancel() -> None:
            self.num_cancels += 1

        transfer = Transfer(cancel, lambda transfer, timeout_s: None)
        self.begun.append((transfer, move))
        return transfer

    async def one(self) -> tuple[Transfer, Callable[[], Awaitable[None]]]:
        """The next read to begin."""
        while not self.begun:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return self.begun.pop(0)


RESULT = TransferResult(64, 4, 4, 0.0, 0.001, Path.LOOPBACK)


@dataclass(slots=True)
class Two:
    holder: Side
    ours: Side
    puller: Puller
    reads: Reads
    address: str
    stop_holder: Callable[[], Any]

    def sequence(self, prompt: Sequence[int] = PROMPT) -> EngineSequence:
        return self.ours.alone(prompt)

    def source(self, num_blocks: int = 4, within_s: float = 0.0, incarnation: int = 1) -> Source:
        return Source(self.holder.worker.identity.worker_id, incarnation, self.address, num_blocks, within_s)

    async def pull(self, prompt: Sequence[int] = PROMPT, **terms: Any) -> PullReport:
        return await self.puller.pull(self.sequence(prompt), self.source(**terms))

    def begin(self, **terms: Any) -> asyncio.Task[PullReport]:
        return asyncio.create_task(self.pull(**terms))

    def cached(self, prompt: Sequence[int] = PROMPT) -> list[int]:
        """The blocks that hold the prompt's full ones here."""
        chain = self.puller._chain(self.sequence(prompt), NUM_BLOCKS)
        with self.ours.worker.engine.exclusive(wake=False) as scheduler:
            return scheduler.pool.match(chain)

    def assert_pulled(self, prompt: Sequence[int] = PROMPT) -> None:
        blocks = self.cached(prompt)
        expected = torch.stack([token_kv(token, i) for i, token in enumerate(prompt[: len(blocks) * BLOCK])])
        assert len(blocks) == (len(prompt) - 1) // BLOCK
        assert torch.equal(self.ours.kv(blocks, len(blocks) * BLOCK), expected)

    def counts(self) -> Any:
        assert self.ours.worker.integrity_ok()
        with self.ours.worker.engine.exclusive(wake=False) as scheduler:
            return scheduler.pool.counts()

    async def quiet(self) -> None:
        """All is given back, on both sides."""
        for each in (self.ours, self.holder):
            await each.quiet()


@asynccontextmanager
async def two_workers(pin_lifetime_s: float = 30.0) -> AsyncIterator[Two]:
    own = layout("float32", BLOCK)
    server = create_server()
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    async with (
        asyncio.timeout(LONG_S),
        side(common_pb2.WORKER_ROLE_DECODE, address, own, 16) as holder,
        side(common_pb2.WORKER_ROLE_PREFILL, "", own, 16) as ours,
        Channels() as channels,
    ):
        reads = Reads(ours.worker.transport)
        ours.worker.transport = reads  # type: ignore[assignment]
        with Holdings(holder.worker, pin_lifetime_s) as holdings:

            async def no_transfers(request: worker_pb2.StopTransferRequest) -> None: ...

            servicer = WorkerServicer(holder.worker, no_transfers, holdings)
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
            await server.start()
            try:
                async with Puller(ours.worker, channels) as puller:
                    yield Two(holder, ours, puller, reads, address, lambda: server.stop(None))
            finally:
                await server.stop(None)


@pytest.fixture
async def two() -> AsyncIterator[Two]:
    async with two_workers() as two:
        await two.holder.cache(PROMPT)
        yield two
        await two.quiet()


async def test_what_is_pulled_is_what_the_holder_computed(two: Two) -> None:
    report = await two.pull()
    assert (report.outcome, report.num_blocks) == (Outcome.PULLED, 4)
    assert report.num_bytes == 4 * two.ours.worker.layout.block_nbytes
    two.assert_pulled()
    assert (await two.pull()).outcome is Outcome.CACHED
    traffic = two.ours.worker.traffic
    assert (traffic.pulls, traffic.blocks_pulled) == ({"pulled": 1, "cached": 1}, 4)
    with two.ours.worker.engine.exclusive(wake=False) as scheduler:
        assert {change.hash for change in scheduler.pool.take_changes()} == set(), "the directory has been told"


async def test_the_directory_hears_of_what_was_pulled(two: Two) -> None:
    told: list[Any] = []
    two.ours.worker.router.tell_directory = told.extend
    await two.pull()
    await asyncio.sleep(0)
    assert [change.hash for change in told if change.stored] == two.puller._chain(two.sequence(), 4)


async def test_a_prefix_that_is_here_is_kept_and_not_read(two: Two) -> None:
    await two.ours.cache(PROMPT[:8])
    two.reads.held = True
    pulling = two.begin()
    transfer, move = await two.reads.one()
    with two.ours.worker.engine.exclusive() as scheduler:
        assert (scheduler.pool.counts().active, scheduler.pool.counts().lent) == (2, 2)
        assert scheduler.pool.num_available == NUM_BLOCKS - 4
    await move()
    transfer.end(RESULT)
    assert (await pulling).num_blocks == 2
    two.assert_pulled()


@pytest.mark.parametrize(
    ("is_late", "ends"),
    [(True, RESULT), (False, RESULT), (False, TransferCancelled("stopped")), (False, PeerLost("gone"))],
)
async def test_blocks_that_are_read_into_are_nobodys_until_the_read_has_stopped(
    two: Two, is_late: bool, ends: Any
) -> None:
    two.reads.held = True
    pulling = two.begin(within_s=1.5 if is_late else 0.0)
    transfer, move = await two.reads.one()
    if is_late:
        assert (await pulling).outcome is Outcome.LATE
    else:
        pulling.cancel()
        await asyncio.wait((pulling,))
        assert pulling.cancelled()
    await asyncio.sleep(0.01)
    assert two.reads.num_cancels == 1
    counts = two.counts()
    assert (counts.quarantined, counts.lent) == (4, 0)
    with two.ours.worker.engine.exclusive(wake=False) as scheduler:
        others = scheduler.pool.allocate(scheduler.pool.num_available)
        assert len(others) == NUM_BLOCKS - 4
        scheduler.pool.release(others)
    assert not two.ours.worker.is_idle(), "a drain waits for the read"
    before = two.ours.pool.clone()
    await move()  # the read went on for a while
    transfer.end(ends)
    await asyncio.sleep(0.01)
    assert two.counts().free == NUM_BLOCKS
    assert two.cached() == []
    assert not torch.equal(two.ours.pool, before), "the test's read wrote nothing"


async def test_a_read_that_fails_is_a_recompute(two: Two) -> None:
    two.reads.held = True
    pulling = two.begin()
    transfer, _ = await two.reads.one()
    transfer.end(PeerLost("its process has ended"))
    assert (await pulling).outcome is Outcome.LOST
    assert two.cached() == []
    assert two.counts().free == NUM_BLOCKS
    async with asyncio.timeout(MAX_PULL_S / 2):  # the holder hears of it, and does not wait for the lease
        while two.holder.worker.pins.num_pins:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_holder_that_evicts_in_the_middle_of_a_read_is_found_out() -> None:
    async with two_workers(pin_lifetime_s=0.1) as two:
        await two.holder.cache(PROMPT)
        two.reads.held = True
        pulling = two.begin()
        transfer, move = await two.reads.one()
        await asyncio.sleep(0.15)
        for start in range(0, NUM_BLOCKS * BLOCK, 60):
            await two.holder.cache([start % 90, *range(30, 89)])  # takes the blocks for other prompts
        await move()
        transfer.end(RESULT)
        assert (await pulling).outcome is Outcome.UNPROVEN
        assert two.cached() == []
        await two.quiet()


@pytest.mark.parametrize("late", [False, True])
async def test_of_a_holder_that_does_not_answer_the_lease_decides(late: bool) -> None:
    async with two_workers(pin_lifetime_s=0.2 if late else 30.0) as two:
        await two.holder.cache(PROMPT)
        two.reads.held = True
        pulling = two.begin()
        transfer, move = await two.reads.one()
        await two.stop_holder()
        if late:
            await asyncio.sleep(0.25)
        await move()
        transfer.end(RESULT)
        assert (await pulling).outcome is (Outcome.UNPROVEN if late else Outcome.PULLED)
        if late:
            assert two.cached() == []
        else:
            two.assert_pulled()
        assert two.counts().active == 0


async def test_who_asks_for_what_is_on_its_way_shares_the_pull(two: Two) -> None:
    two.reads.held = True
    first = two.begin()
    transfer, move = await two.reads.one()
    second = two.begin()
    third = asyncio.create_task(two.pull(PROMPT[:9], num_blocks=2))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    assert two.reads.num_cancels == 0, "somebody still waits for it"
    await move()
    transfer.end(RESULT)
    assert (await second).outcome is (await third).outcome is Outcome.PULLED
    assert two.reads.begun == []
    two.assert_pulled()


async def test_as_many_pulls_as_may_be(two: Two) -> None:
    with two.ours.worker.engine.exclusive(wake=False):
        others = [two.ours.worker.pulls.begin([b"%16d" % i]) for i in range(MAX_PULLS)]
    assert (await two.pull()).outcome is Outcome.BUSY
    for pull in others:
        assert pull is not None
        two.ours.worker.pulls.stop(pull)
    assert (await two.pull()).outcome is Outcome.PULLED


async def test_whoever_runs_or_waits_keeps_its_blocks(two: Two) -> None:
    with two.ours.worker.engine.exclusive(wake=False) as scheduler:
        mine = scheduler.pool.allocate(NUM_BLOCKS - 1)
        spare = scheduler.num_spare_blocks
    assert spare == 1
    assert (report := await two.pull()).outcome is Outcome.PULLED
    assert report.num_blocks == 1, "as many as are to spare"
    with two.ours.worker.engine.exclusive(wake=False) as scheduler:
        mine += scheduler.pool.allocate(1)
    assert (await two.pull()).outcome is Outcome.NO_ROOM
    with two.ours.worker.engine.exclusive(wake=False) as scheduler:
        scheduler.pool.release(mine)


async def test_nothing_is_read_over_a_path_that_could_harm_the_holder(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteRegion(1, 1 << 20, Path.RMA, lambda _: None, "the owner is on another host")
    monkeypatch.setattr(two.reads.transport, "open", lambda descriptor: remote)
    two.reads.held = True
    assert (await two.pull()).outcome is Outcome.UNSAFE
    await two.quiet()
    asked: list[Any] = []
    monkeypatch.setattr(puller_module.Puller, "_pin", lambda *arguments: asked.append(arguments))
    assert (await two.pull()).outcome is Outcome.UNSAFE
    assert (asked, two.reads.begun) == ([], [])


async def test_another_process_of_the_holders_name_is_not_asked_twice(two: Two) -> None:
    assert (await two.pull(incarnation=2)).outcome is Outcome.REFUSED
    two.holder.worker.draining = True
    assert (await two.pull()).outcome is Outcome.REFUSED


async def test_shutting_down_waits_for_the_last_byte() -> None:
    async with two_workers() as two:
        await two.holder.cache(PROMPT)
        two.reads.held = True
        pulling = two.begin()
        transfer, move = await two.reads.one()
        closing = asyncio.create_task(two.puller.__aexit__(None, None, None))
        assert (await pulling).outcome is Outcome.CANCELLED
        await asyncio.sleep(0.02)
        assert not closing.done()
        assert two.counts().quarantined == 4
        await move()
        transfer.end(TransferCancelled("stopped"))
        await closing
        assert two.counts().free == NUM_BLOCKS


async def test_what_pulls_take_is_measured(two: Two) -> None:
    began_s = time.monotonic()
    await two.pull()
    load = two.ours.worker.load()
    assert load.pull_bytes_per_s > 0
    assert 0 < load.pull_overhead_s < time.monotonic() - began_s
    assert two.holder.worker.load().num_pinnable_blocks == 4
