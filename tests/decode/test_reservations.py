"""A verified commit against what may happen while its blocks are read: the reading is held up at will."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import AbortedError, ConflictError, InvalidRequestError
from services.decode.reservations import Finished, News, Reservations, Terms, Writer
from services.decode.tickets import Ticket, WriterId, Written
from services.engine.sequence import FinishReason, TokenDrawn
from services.runtime.channels import Channels
from services.runtime.process import ProcessIdentity, this_process
from services.worker.puller import Puller
from services.worker.servicer import WorkerServicer, drain
from services.worker.share import Share
from services.worker.worker import Worker
from tests.worker.tiny import LAYOUT, NO_PROCESS, NUM_BLOCKS, SAMPLING, HeldDigester, make_worker
from transport import Transport, create
from transport.loopback import LoopbackTransport

PROMPT = list(range(10))
FIRST = common_pb2.Token(index=0, id=7)
WRITER = Writer(WriterId("prefill-0", 7), "127.0.0.1:1", NO_PROCESS)
HONEST = [11, 12, 13]
names = (f"r{i}" for i in itertools.count())


@pytest.fixture
def transport() -> Iterator[Transport]:
    with create("loopback") as transport:
        yield transport


@pytest.fixture
async def worker(transport: Transport) -> Worker:
    return make_worker(transport, "decode-0", common_pb2.WORKER_ROLE_DECODE)


@pytest.fixture
async def digester() -> HeldDigester:
    return HeldDigester()


@pytest.fixture
def drawn() -> deque[float]:
    """The first ticket is verified, and no other unless the test adds to this."""
    return deque([0.1])


@pytest.fixture
async def reservations(worker: Worker, digester: HeldDigester, drawn: deque[float]) -> AsyncIterator[Reservations]:
    terms = Terms(ticket_lifetime_s=60.0, verified=Share.parse("1/2"), pair_quarantine_s=60.0)
    async with (
        Channels() as channels,
        Puller(worker, channels) as puller,
        Reservations(worker, channels, puller, digester, terms, lambda: drawn.popleft() if drawn else 0.9) as it,  # type: ignore[arg-type]
    ):
        yield it
        assert worker.integrity_ok()


@asynccontextmanager
async def opened(
    reservations: Reservations,
    writer: Writer = WRITER,
    prompt: list[int] = PROMPT,
    salt: bytes = b"",
    params: common_pb2.SamplingParams = SAMPLING,
) -> AsyncIterator[tuple[asyncio.Queue[News], Ticket]]:
    """Nothing of the prompt is cached, unless a salt was used before."""
    name = next(names)
    news = asyncio.Queue[News]()
    stream = reservations.open(name, list(prompt), params, salt or name.encode(), writer, news.put_nowait)
    try:
        assert stream.ticket is not None
        yield news, stream.ticket
    finally:
        reservations.close(stream)


def commit(reservations: Reservations, ticket: Ticket, epoch: int | None = None) -> asyncio.Task[float]:
    num_blocks = len(ticket.blocks)
    digests = tuple(HONEST[:num_blocks]) if ticket.verify else ()
    written = Written(num_blocks, ticket.num_tokens, num_blocks * LAYOUT.block_nbytes, digests)
    return asyncio.create_task(
        reservations.commit(ticket.transfer_id, epoch or ticket.epoch, ticket.writer, written, FIRST)
    )


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def num_free(worker: Worker) -> int:
    with worker.engine.exclusive(wake=False) as scheduler:
        return scheduler.pool.counts().free


async def go_on(worker: Worker) -> None:
    """The step behind what was committed."""
    assert worker.engine.step()
    await settle()


async def test_no_token_comes_before_the_blocks_were_verified(
    reservations: Reservations, digester: HeldDigester, worker: Worker
) -> None:
    async with opened(reservations) as (news, ticket):
        task = commit(reservations, ticket)
        await settle()
        assert digester.begun == [(ticket.blocks, 0, 10)]
        assert not task.done()
        assert news.empty()
        digester.found[0].set_result(HONEST)
        assert await task > 0
        await go_on(worker)
        assert isinstance(news.get_nowait(), TokenDrawn)
        assert (worker.traffic.checks_ok, worker.traffic.blocks_received) == (1, 3)


async def test_a_delivered_token_is_told_when_the_step_behind_it_begins(
    reservations: Reservations, worker: Worker, drawn: deque[float]
) -> None:
    drawn[0] = 0.9
    async with opened(reservations) as (news, ticket):
        await commit(reservations, ticket)
        await settle()
        assert news.empty(), "nothing goes on behind it yet"
        await go_on(worker)
        first, second = (news.get_nowait() for _ in range(2))
        assert isinstance(first, TokenDrawn)
        assert isinstance(second, TokenDrawn)
        assert (first.index, first.drawn.token_id, second.index) == (0, FIRST.id, 1)


async def test_a_delivered_token_that_is_the_last_one_is_told_at_once(
    reservations: Reservations, drawn: deque[float]
) -> None:
    drawn[0] = 0.9
    params = common_pb2.SamplingParams(max_tokens=1, temperature=0, top_p=1, top_k=0, seed=0)
    async with opened(reservations, params=params) as (news, ticket):
        await commit(reservations, ticket)
        first, end = news.get_nowait(), news.get_nowait()
        assert isinstance(first, TokenDrawn)
        assert end == Finished(FinishReason.LENGTH)


async def test_what_is_not_in_the_sample_is_taken_at_its_word(
    reservations: Reservations, digester: HeldDigester, worker: Worker
) -> None:
    async with opened(reservations), opened(reservations) as (news, ticket):
        assert not ticket.verify
        assert await commit(reservations, ticket) == 0
        await go_on(worker)
        assert isinstance(news.get_nowait(), TokenDrawn)
    assert digester.begun == []
    assert worker.traffic.checks_ok == 0


async def test_what_is_cached_is_not_verified_again(
    reservations: Reservations, digester: HeldDigester, drawn: deque[float], worker: Worker
) -> None:
    whole_blocks = PROMPT[:8]
    drawn[0] = 0.9
    async with opened(reservations, prompt=whole_blocks, salt=b"same") as (_, ticket):
        await commit(reservations, ticket)
    drawn.append(0.1)
    async with opened(reservations, prompt=whole_blocks, salt=b"same") as (news, ticket):
        assert (ticket.blocks, ticket.verify) == ((), False)
        assert await commit(reservations, ticket) == 0
        await go_on(worker)
        assert isinstance(news.get_nowait(), TokenDrawn)
    drawn.append(0.1)
    async with opened(reservations, prompt=PROMPT, salt=b"same") as (_, ticket):
        task = commit(reservations, ticket)
        await settle()
        assert digester.begun == [(ticket.blocks, 2, 10)], "the part that was sent, at its place in the prompt"
        digester.found[0].set_result([HONEST[0]])
        assert await task > 0


async def test_damage_fails_the_request_counts_and_quarantines_the_pair(
    reservations: Reservations, digester: HeldDigester, worker: Worker
) -> None:
    other = Writer(WriterId("prefill-1", 1), WRITER.control_address, WRITER.process)
    async with (
        opened(reservations) as (news, ticket),
        opened(reservations) as (same_writer, _),
        opened(reservations, other) as (another, its_ticket),
    ):
        task = commit(reservations, ticket)
        await settle()
        digester.found[0].set_result([11, 0, 13])
        with pytest.raises(ConflictError, match=r"block\(s\) 1 of the prompt did not arrive") as refused:
            await task
        assert refused.value.reason == "CHECKSUM_MISMATCH"
        failed = news.get_nowait()
        assert isinstance(failed, AbortedError)
        assert failed.reason == "CHECKSUM_MISMATCH"
        assert (worker.traffic.checks_mismatch, worker.traffic.blocks_received) == (1, 0)
        given_up = same_writer.get_nowait()
        assert isinstance(given_up, AbortedError)
        assert given_up.reason == "PAIR_QUARANTINED"
        with pytest.raises(AbortedError, match="takes no blocks from prefill-0 for another 60 s") as quarantined:
            async with opened(reservations):
                pytest.fail("a ticket was given")
        assert quarantined.value.reason == "PAIR_QUARANTINED"
        assert await commit(reservations, its_ticket) == 0
        await go_on(worker)
        assert isinstance(another.get_nowait(), TokenDrawn)


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
    digester.found[0].set_result(HONEST)
    with pytest.raises(ConflictError, match="given up"):
        await task
    assert num_free(worker) == NUM_BLOCKS
    await asyncio.wait_for(draining, 1)


async def test_the_verdict_stands_when_the_writer_no_longer_waits_for_it(
    reservations: Reservations, digester: HeldDigester, worker: Worker
) -> None:
    async with opened(reservations) as (news, ticket):
        first = commit(reservations, ticket)
        await settle()
        first.cancel()
        reservations.abort_by_writer(ticket.transfer_id, ticket.epoch, ticket.writer, "gave up waiting")
        again = commit(reservations, ticket)
        await settle()
        assert len(digester.begun) == 1
        digester.found[0].set_result(HONEST)
        assert await again > 0
        await go_on(worker)
        assert [news.get_nowait().index for _ in range(news.qsize())] == [0, 1], "the first one once"  # type: ignore[union-attr]


async def test_a_message_in_the_writers_name_does_not_disturb_a_check(
    reservations: Reservations, digester: HeldDigester, worker: Worker
) -> None:
    async with opened(reservations) as (news, ticket):
        task = commit(reservations, ticket)
        await settle()
        with pytest.raises(ConflictError, match="epoch"):
            await commit(reservations, ticket, epoch=99)
        digester.found[0].set_result(HONEST)
        await task
        await go_on(worker)
        assert isinstance(news.get_nowait(), TokenDrawn)


async def test_a_check_that_breaks_fails_the_transfer_and_blames_nobody(
    reservations: Reservations, digester: HeldDigester, worker: Worker
) -> None:
    async with opened(reservations) as (news, ticket):
        task = commit(reservations, ticket)
        await settle()
        digester.found[0].set_exception(MemoryError())
        with pytest.raises(ConflictError, match="could not be verified"):
            await task
        assert isinstance(news.get_nowait(), AbortedError)
    assert num_free(worker) == NUM_BLOCKS
    assert (worker.traffic.checks_ok, worker.traffic.checks_mismatch) == (0, 0)
    async with opened(reservations):
        pass


async def test_a_doubtful_commit_fails_the_request_and_its_blocks_wait_for_proof(
    reservations: Reservations, worker: Worker
) -> None:
    async with opened(reservations) as (news, ticket):
        half = Written(1, ticket.num_tokens, LAYOUT.block_nbytes, tuple(HONEST))
        with pytest.raises(ConflictError, match="its writer says that it wrote 10 tokens in 1 blocks"):
            await reservations.commit(ticket.transfer_id, ticket.epoch, ticket.writer, half, FIRST)
        failed = news.get_nowait()
        assert isinstance(failed, AbortedError)
        assert "in 1 blocks" in failed.message
        await settle()
        assert num_free(worker) == NUM_BLOCKS - 3
        reservations.abort_by_writer(ticket.transfer_id, ticket.epoch, ticket.writer, "that was the last one")
        assert num_free(worker) == NUM_BLOCKS


async def test_a_first_token_that_is_none_is_refused_and_changes_nothing(
    reservations: Reservations, drawn: deque[float], worker: Worker
) -> None:
    drawn[0] = 0.9
    async with opened(reservations) as (news, ticket):
        written = Written(len(ticket.blocks), ticket.num_tokens, len(ticket.blocks) * LAYOUT.block_nbytes)
        with pytest.raises(InvalidRequestError, match="the first token, 100, is outside the vocabulary of 100"):
            await reservations.commit(
                ticket.transfer_id, ticket.epoch, ticket.writer, written, common_pb2.Token(index=0, id=100)
            )
        assert news.empty()
        await commit(reservations, ticket)
        await go_on(worker)
        assert isinstance(news.get_nowait(), TokenDrawn)


@pytest.mark.parametrize("successor_answers", [False, True])
async def test_blocks_of_a_dead_writer_come_back_behind_a_fence(
    reservations: Reservations, worker: Worker, monkeypatch: pytest.MonkeyPatch, successor_answers: bool
) -> None:
    arrived = threading.Event()
    asked = asyncio.Queue[None]()
    loop = asyncio.get_running_loop()

    def fence(self: LoopbackTransport, timeout_s: float) -> bool:
        loop.call_soon_threadsafe(asked.put_nowait, None)
        return arrived.is_set()

    monkeypatch.setattr(LoopbackTransport, "fence", fence)
    if successor_answers:  # from a place where nobody can see whether its predecessor has ended
        server = grpc.aio.server()
        successor = make_worker(worker.transport, "prefill-0", common_pb2.WORKER_ROLE_PREFILL)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(successor, writes_nothing, None), server)  # type: ignore[arg-type]
        writer = replace(WRITER, control_address=f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
    else:
        writer = replace(WRITER, process=replace(this_process(), start_time_ticks=1))
    async with opened(reservations, writer) as (_, ticket):
        pass
    for _ in range(2):
        await asyncio.wait_for(asked.get(), 10)
    assert num_free(worker) == NUM_BLOCKS - len(ticket.blocks)
    arrived.set()
    async with asyncio.timeout(10):
        await drain(worker)
    assert num_free(worker) == NUM_BLOCKS
    if successor_answers:
        await server.stop(None)


class Answering(worker_pb2_grpc.WorkerServiceServicer):
    """Says at the writer's address that it is these incarnations, the last one for ever; as 0 it does not answer."""

    def __init__(self, incarnations: Sequence[int]) -> None:
        self.asked = asyncio.Queue[None]()
        self._incarnations = deque(incarnations)

    async def StopTransfer(
        self, request: worker_pb2.StopTransferRequest, context: Any
    ) -> worker_pb2.StopTransferResponse:
        self.asked.put_nowait(None)
        incarnation = self._incarnations[0]
        if len(self._incarnations) > 1:
            self._incarnations.popleft()
        if not incarnation:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return worker_pb2.StopTransferResponse(incarnation=incarnation)


@asynccontextmanager
async def answering(*incarnations: int) -> AsyncIterator[tuple[Answering, Writer]]:
    server, it = grpc.aio.server(), Answering(incarnations)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(it, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield it, replace(WRITER, control_address=address)
    await server.stop(None)


@pytest.mark.parametrize(
    ("incarnation", "process"), [(0, NO_PROCESS), (9, this_process())], ids=["out of reach", "replaced, but runs"]
)
async def test_blocks_of_a_writer_that_may_still_write_stay_in_quarantine(
    reservations: Reservations, worker: Worker, monkeypatch: pytest.MonkeyPatch, incarnation: int,
    process: ProcessIdentity,
) -> None:  # fmt: skip
    monkeypatch.setattr("services.decode.reservations.STOP_BACKOFF_S", (0.01, 0.01))
    async with answering(incarnation) as (it, writer):
        async with opened(reservations, replace(writer, process=process)) as (_, ticket):
            pass
        for _ in range(3):
            await asyncio.wait_for(it.asked.get(), 10)
        assert num_free(worker) == NUM_BLOCKS - len(ticket.blocks)
        reservations.abort_by_writer(ticket.transfer_id, ticket.epoch, ticket.writer, "it says so itself")
        async with asyncio.timeout(10):
            await drain(worker)
        assert num_free(worker) == NUM_BLOCKS


@pytest.mark.parametrize("refused_first", [False, True])
async def test_a_writer_that_did_not_say_at_once_that_it_has_stopped_is_believed_behind_a_fence(
    reservations: Reservations, worker: Worker, monkeypatch: pytest.MonkeyPatch, refused_first: bool
) -> None:
    """A connection of its may have broken, of which something may lie in a socket here."""
    monkeypatch.setattr("services.decode.reservations.STOP_BACKOFF_S", (0.01, 0.01))
    num_free_at_fences: list[int] = []

    def fence(self: LoopbackTransport, timeout_s: float) -> bool:
        num_free_at_fences.append(num_free(worker))
        return len(num_free_at_fences) > 1

    monkeypatch.setattr(LoopbackTransport, "fence", fence)
    incarnation = WRITER.id.incarnation
    async with answering(*([0] if refused_first else []), incarnation) as (_, writer):
        async with opened(reservations, writer) as (_, ticket):
            pass
        async with asyncio.timeout(10):
            await drain(worker)
    assert num_free_at_fences == ([NUM_BLOCKS - len(ticket.blocks)] * 2 if refused_first else [])
    assert num_free(worker) == NUM_BLOCKS


async def writes_nothing(request: worker_pb2.StopTransferRequest) -> None:
    pytest.fail("another incarnation was asked for")
