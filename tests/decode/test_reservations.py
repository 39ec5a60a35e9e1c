"""A verified commit against what may happen while its blocks are read: the reading is held up at will."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from kvferry.api.common.v1 import common_pb2
from kvferry.errors import AbortedError, ConflictError
from services.decode.reservations import DecodeStream, Reservations, Terms, Writer
from services.decode.tickets import Ticket, WriterId
from services.engine.batch import Batch
from services.engine.blocks import BlockPool
from services.engine.engine import Engine
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.sampling_params import DrawFailed, Drawn
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import TokenDrawn
from services.runtime.channels import Channels
from services.runtime.process import ProcessIdentity
from services.worker.events import EventRouter
from services.worker.servicer import drain
from services.worker.share import Share
from services.worker.worker import Identity, Worker
from transport import Transport, create

MODEL = ModelConfig(
    name="m", revision="r", architecture="llama", hidden_size=2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
    intermediate_size=2, vocab_size=100, context_length=64, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
    tied_embeddings=True, sliding_window=None, qkv_bias=False, bos_token_id=None, eos_token_ids=(),
)  # fmt: skip
LAYOUT = KvLayout(model_revision="r", dtype="float32", block_size=4, num_layers=1, num_kv_heads=1, head_dim=2)
NUM_BLOCKS = 16
PROMPT = list(range(10))
SAMPLING = common_pb2.SamplingParams(max_tokens=4, temperature=0, top_p=1, top_k=0, seed=0)
FIRST = common_pb2.Token(index=0, id=7)
WRITER = Writer(WriterId("prefill-0", 7), "127.0.0.1:1", ProcessIdentity("", 0, 0, 0))
HONEST = [11, 12, 13]
names = (f"r{i}" for i in itertools.count())


class NoRunner:
    def run(self, batch: Batch) -> list[Drawn | DrawFailed]:
        raise AssertionError("the engine of these tests is never started")


@dataclass(slots=True)
class HeldDigester:
    """Says how far it got, and goes on when told what was found."""

    begun: list[tuple[tuple[int, ...], int, int]] = field(default_factory=list)
    found: asyncio.Future[list[int]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def digest(self, blocks: tuple[int, ...], first_index: int, num_prompt_tokens: int) -> asyncio.Future[list[int]]:
        self.begun.append((blocks, first_index, num_prompt_tokens))
        return self.found


@pytest.fixture
def transport() -> Iterator[Transport]:
    with create("loopback") as transport:
        yield transport


@pytest.fixture
async def worker(transport: Transport) -> Worker:
    router = EventRouter(asyncio.get_running_loop())
    scheduler = Scheduler(BlockPool(NUM_BLOCKS), Limits(block_size=4, context_length=64))
    identity = Identity("decode-0", 1, common_pb2.WORKER_ROLE_DECODE, "127.0.0.1:2", ProcessIdentity("", 0, 0, 0))
    region = transport.allocate(NUM_BLOCKS * LAYOUT.block_nbytes)
    return Worker(identity, MODEL, LAYOUT, transport, region, Engine(scheduler, NoRunner(), router), router)


@pytest.fixture
async def digester() -> HeldDigester:
    return HeldDigester()


@pytest.fixture
async def reservations(worker: Worker, digester: HeldDigester) -> AsyncIterator[Reservations]:
    terms = Terms(ticket_lifetime_s=60.0, verified=Share.parse("1/2"), pair_quarantine_s=60.0)
    drawn = itertools.chain([0.1], itertools.repeat(0.9))  # the first ticket is verified, and no other
    async with Channels() as channels, Reservations(worker, channels, digester, terms, lambda: next(drawn)) as it:  # type: ignore[arg-type]
        yield it
        assert worker.integrity_ok()


@asynccontextmanager
async def opened(reservations: Reservations, writer: Writer = WRITER) -> AsyncIterator[tuple[DecodeStream, Ticket]]:
    name = next(names)
    async with reservations.open(name, list(PROMPT), SAMPLING, name.encode(), writer) as stream:
        assert stream.ticket is not None
        yield stream, stream.ticket


def commit(reservations: Reservations, ticket: Ticket, epoch: int | None = None) -> asyncio.Task[float]:
    return asyncio.create_task(
        reservations.commit(
            ticket.transfer_id, epoch or ticket.epoch, ticket.writer, len(ticket.blocks),
            len(ticket.blocks) * LAYOUT.block_nbytes, HONEST if ticket.verify else [], FIRST,
        )
    )  # fmt: skip


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def num_free(worker: Worker) -> int:
    with worker.engine.exclusive(wake=False) as scheduler:
        return scheduler.pool.counts().free


async def test_no_token_comes_before_the_blocks_were_verified(
    reservations: Reservations, digester: HeldDigester, worker: Worker
) -> None:
    async with opened(reservations) as (stream, ticket):
        task = commit(reservations, ticket)
        await settle()
        assert digester.begun == [(ticket.blocks, 0, 10)]
        assert not task.done()
        assert stream.events.empty()
        digester.found.set_result(HONEST)
        assert await task > 0
        assert isinstance(stream.events.get_nowait(), TokenDrawn)
        assert (worker.traffic.checks_ok, worker.traffic.blocks_received) == (1, 3)


async def test_what_is_not_in_the_sample_is_taken_at_its_word(
    reservations: Reservations, digester: HeldDigester, worker: Worker
) -> None:
    async with opened(reservations), opened(reservations) as (stream, ticket):
        assert not ticket.verify
        assert await commit(reservations, ticket) == 0
        assert isinstance(stream.events.get_nowait(), TokenDrawn)
    assert digester.begun == []
    assert worker.traffic.checks_ok == 0


async def test_damage_fails_the_request_counts_and_quarantines_the_pair(
    reservations: Reservations, digester: HeldDigester, worker: Worker
) -> None:
    other = Writer(WriterId("prefill-1", 1), WRITER.control_address, WRITER.process)
    async with (
        opened(reservations) as (stream, ticket),
        opened(reservations) as (same_writer, _),
        opened(reservations, other) as (another, its_ticket),
    ):
        task = commit(reservations, ticket)
        await settle()
        digester.found.set_result([11, 0, 13])
        with pytest.raises(ConflictError, match=r"block\(s\) 1 of the prompt did not arrive") as refused:
            await task
        assert refused.value.reason == "CHECKSUM_MISMATCH"
        failed = stream.events.get_nowait()
        assert isinstance(failed, AbortedError)
        assert failed.reason == "CHECKSUM_MISMATCH"
        assert (worker.traffic.checks_mismatch, worker.traffic.blocks_received) == (1, 0)
        given_up = same_writer.events.get_nowait()
        assert isinstance(given_up, AbortedError)
        assert given_up.reason == "PAIR_QUARANTINED"
        with pytest.raises(AbortedError, match="takes no blocks from prefill-0 for another 60 s") as quarantined:
            async with opened(reservations):
                pytest.fail("a ticket was given")
        assert quarantined.value.reason == "PAIR_QUARANTINED"
        assert await commit(reservations, its_ticket) == 0
        assert isinstance(another.events.get_nowait(), TokenDrawn)


async def test_a_cancelled_request_keeps_its_blocks_until_the_check_has_ended(
    reservations: Reservations, digester: HeldDigester, worker: Worker
) -> None:
    async with opened(reservations) as (_, ticket):
        task = commit(reservations, ticket)
        await settle()
    draining = asyncio.create_task(drain(worker))
    await settle()
    assert num_free(worker) == NUM_BLOCKS - 3
    assert worker.integrity_ok()
    assert not draining.done()
    digester.found.set_result(HONEST)
    with pytest.raises(ConflictError, match="given up"):
        await task
    assert num_free(worker) == NUM_BLOCKS
    await asyncio.wait_for(draining, 1)


async def test_the_verdict_stands_when_the_writer_no_longer_waits_for_it(
    reservations: Reservations, digester: HeldDigester
) -> None:
    async with opened(reservations) as (stream, ticket):
        first = commit(reservations, ticket)
        await settle()
        first.cancel()
        reservations.abort_by_writer(ticket.transfer_id, ticket.epoch, ticket.writer, "gave up waiting")
        again = commit(reservations, ticket)
        await settle()
        assert len(digester.begun) == 1
        digester.found.set_result(HONEST)
        assert await again > 0
        assert isinstance(stream.events.get_nowait(), TokenDrawn)
        assert stream.events.empty()


async def test_a_message_in_the_writers_name_does_not_disturb_a_check(
    reservations: Reservations, digester: HeldDigester
) -> None:
    async with opened(reservations) as (stream, ticket):
        task = commit(reservations, ticket)
        await settle()
        with pytest.raises(ConflictError, match="epoch"):
            await commit(reservations, ticket, epoch=99)
        digester.found.set_result(HONEST)
        await task
        assert isinstance(stream.events.get_nowait(), TokenDrawn)


async def test_a_check_that_breaks_fails_the_transfer_and_blames_nobody(
    reservations: Reservations, digester: HeldDigester, worker: Worker
) -> None:
    async with opened(reservations) as (stream, ticket):
        task = commit(reservations, ticket)
        await settle()
        digester.found.set_exception(MemoryError())
        with pytest.raises(ConflictError, match="could not be verified"):
            await task
        assert isinstance(stream.events.get_nowait(), AbortedError)
    assert num_free(worker) == NUM_BLOCKS
    assert (worker.traffic.checks_ok, worker.traffic.checks_mismatch) == (0, 0)
    async with opened(reservations):
        pass
