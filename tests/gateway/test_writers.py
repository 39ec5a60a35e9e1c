"""What a prefill worker that a test plays does to a request, and to those after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.admission import Objectives
from gateway.dispatch import Dispatcher
from gateway.job import Job
from gateway.link import DecodeLinks
from gateway.routing import Policy
from gateway.view import ClusterView, WorkerGone
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import Error, UnavailableError
from services.runtime.channels import Channels
from services.runtime.server import create_server
from tests.gateway.played import Played, playing, token
from tests.gateway.reading import Reading
from tests.gateway.test_dispatch import LONG_S, REVISION, begin
from tests.gateway.test_pull_source import PROMPT, joined

DECODE = common_pb2.WORKER_ROLE_DECODE
NOTHING_PROMISED = Objectives()


@dataclass
class Prefill(worker_pb2_grpc.PrefillServiceServicer):
    """Says nothing, or fails at once, or gives a first token and no more."""

    failure: Error | None = None
    computes: bool = False
    asked: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    ended: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    async def Prefill(self, request: worker_pb2.PrefillRequest, context: Any) -> Any:
        self.asked.put_nowait(request.request_id)
        try:
            if self.failure is not None:
                raise self.failure
            if self.computes:
                yield worker_pb2.PrefillResponse(first_token=common_pb2.Token(id=1))
            await asyncio.sleep(LONG_S)
            yield worker_pb2.PrefillResponse()
        finally:
            self.ended.put_nowait(request.request_id)


@asynccontextmanager
async def dispatching(
    prefill: Prefill, stall_timeout_s: float = LONG_S, objectives: Objectives = NOTHING_PROMISED
) -> AsyncIterator[tuple[Played, Dispatcher]]:
    server = create_server()
    worker_pb2_grpc.add_PrefillServiceServicer_to_server(prefill, server)
    prefill_address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with playing() as (played, address), Channels() as channels, DecodeLinks(channels) as links:
        events = [
            joined("decode-0", DECODE, address, 100),
            joined("prefill-0", common_pb2.WORKER_ROLE_PREFILL, prefill_address, 100),
        ]
        view = ClusterView()
        view.apply(directory_pb2.WatchResponse(revision=1, events=events, snapshot=True))
        yield (
            played,
            Dispatcher(
                view, channels, links, model_revision=REVISION, routing=Policy.LEAST_LOADED, min_ship_tokens=1,
                max_attempts=2, stall_timeout_s=stall_timeout_s, objectives=objectives,
            ),
        )  # fmt: skip
    await server.stop(None)


def ask(dispatcher: Dispatcher, name: str) -> Reading:
    return Reading(dispatcher, Job(name, PROMPT, common_pb2.SamplingParams(max_tokens=4)), LONG_S)


async def opened(played: Played) -> worker_pb2.DecodeOpen:
    while not (request := await played.sent.get()).HasField("open"):
        pass
    return request.open


async def give_ticket(played: Played) -> worker_pb2.DecodeOpen:
    open_ = await opened(played)
    played.say(worker_pb2.DecodeEvent(handle=open_.handle, ticket=worker_pb2.Ticket(transfer_id="t")))
    return open_


@pytest.mark.parametrize(
    ("objectives", "waits"), [(NOTHING_PROMISED, False), (Objectives(ttft_s=9.0), False), (Objectives(itl_s=9.0), True)]
)
async def test_where_gaps_are_promised_a_first_token_waits_until_its_answer_goes_on(
    objectives: Objectives, waits: bool
) -> None:
    prefill = Prefill(computes=True)
    async with (
        dispatching(prefill, objectives=objectives) as (played, dispatcher),
        aclosing(ask(dispatcher, "r")) as it,
    ):
        first = begin(it)
        open_ = await give_ticket(played)
        await prefill.asked.get()
        done, _ = await asyncio.wait([first], timeout=0.3 if waits else LONG_S)
        assert bool(done) is not waits
        drawn = worker_pb2.DecodeEvent(handle=open_.handle, token=common_pb2.Token(id=1))
        played.say(drawn, token(open_.handle, 1))
        tokens = await first
        if len(tokens) < 2:
            tokens = tokens + await anext(it)
        assert [t.index for t in tokens] == [0, 1]


async def test_a_writer_that_says_nothing_is_passed_over_and_not_the_worker_that_waits_for_it() -> None:
    prefill = Prefill()
    async with (
        dispatching(prefill, stall_timeout_s=0.3) as (played, dispatcher),
        aclosing(ask(dispatcher, "r")) as answer,
    ):
        reading = begin(answer)
        assert (await give_ticket(played)).writer.worker_id == "prefill-0"
        again = await opened(played)
        assert not again.HasField("writer")
        played.say(token(again.handle, 0))
        assert [t.index for t in await reading] == [0]
        assert await prefill.ended.get() == "r"


async def test_that_a_decode_worker_was_given_up_is_not_its_writers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.dispatch.GONE_STALL_S", 0.1)
    async with dispatching(Prefill()) as (played, dispatcher), aclosing(ask(dispatcher, "r")) as answer:
        reading = begin(answer)
        await give_ticket(played)
        (address,) = {w.info.control_address for w in dispatcher._view.workers.values() if w.info.role == DECODE}
        other = directory_pb2.WatchResponse(revision=2, events=[joined("decode-1", DECODE, address, 100)])
        gone = WorkerGone("decode-0", 3, directory_pb2.LEAVE_REASON_EXPIRED)
        dispatcher.members_changed([*dispatcher._view.apply(other), gone])
        again = await opened(played)
        assert again.writer.worker_id == "prefill-0"
        played.say(token(again.handle, 0))
        assert [t.index for t in await reading] == [0]


async def test_workers_that_cannot_reach_each_other_are_not_paired_for_the_next_request() -> None:
    prefill = Prefill(UnavailableError("the pool's owner was lost", reason="OWNER_LOST"))
    async with dispatching(prefill) as (played, dispatcher):
        for name in ("first", "second"):
            async with aclosing(ask(dispatcher, name)) as answer:
                reading = begin(answer)
                if name == "first":
                    assert (await give_ticket(played)).writer.worker_id == "prefill-0"
                alone = await opened(played)
                assert (alone.request_id, alone.HasField("writer")) == (name, False)
                played.say(token(alone.handle, 0))
                await reading
    assert prefill.asked.qsize() == 1


async def test_who_gives_up_stops_the_writer_too() -> None:
    prefill = Prefill()
    async with dispatching(prefill) as (played, dispatcher), aclosing(ask(dispatcher, "r")) as answer:
        reading = begin(answer)
        await give_ticket(played)
        assert await prefill.asked.get() == "r"
        reading.cancel()
        await asyncio.wait((reading,))
        assert await asyncio.wait_for(prefill.ended.get(), 5) == "r"


async def test_the_next_prompt_is_computed_while_the_last_of_the_one_before_is_written() -> None:
    """Another may not wait behind it: at 10 tokens/s each takes 16 s."""
    for computes in (False, True):
        async with dispatching(Prefill(computes=computes)) as (played, dispatcher):
            measured = directory_pb2.WorkerLoad(prefill_tokens_per_s=10.0, blocks=common_pb2.BlockCounts(free=100))
            load = directory_pb2.WorkerLoadChanged(worker_id="prefill-0", incarnation=3, load=measured)
            dispatcher._view.apply(directory_pb2.WatchResponse(revision=2, events=[directory_pb2.Event(load=load)]))
            async with aclosing(ask(dispatcher, "a")) as a, aclosing(ask(dispatcher, "b")) as b:
                reading = [begin(a), begin(b)]
                assert (await give_ticket(played)).request_id == "a"
                if computes:
                    assert (await opened(played)).request_id == "b"
                else:
                    await asyncio.sleep(0.2)
                    assert played.sent.empty()
                for task in reading:
                    task.cancel()
                await asyncio.wait(reading)
