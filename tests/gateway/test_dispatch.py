"""One request on a worker that a test plays: what gathers, what is for now, and what ends it."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import grpc
import pytest

from gateway.decoding import WORKER_RETRY_S, as_lost
from gateway.dispatch import NO_WORKER_RETRY_S, Dispatcher
from gateway.job import Job, Trace
from gateway.link import DecodeLinks
from gateway.request import Stream, TokenCame
from gateway.retry_budget import RetryBudget
from gateway.routing import Policy
from gateway.run import Run
from gateway.view import ClusterView, WorkerGone
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import DeadlineError, InternalError, UnavailableError
from services.runtime.channels import Channels
from tests.gateway.played import Played, playing, token
from tests.gateway.reading import Reading

REVISION = "rev-1"
LONG_S = 15.0


def view_of(address: str) -> ClusterView:
    view = ClusterView()
    join(view, address)
    return view


def join(view: ClusterView, address: str, incarnation: int = 1, worker_id: str = "decode-0") -> None:
    info = directory_pb2.WorkerInfo(
        worker_id=worker_id, incarnation=incarnation, role=common_pb2.WORKER_ROLE_DECODE, control_address=address,
        model=common_pb2.ModelInfo(revision=REVISION), layout=common_pb2.Layout(block_size_tokens=16),
    )  # fmt: skip
    load = directory_pb2.WorkerLoad(blocks=common_pb2.BlockCounts(free=100))
    joined = directory_pb2.Event(joined=directory_pb2.WorkerState(info=info, load=load))
    is_first = not view.workers
    view.apply(directory_pb2.WatchResponse(revision=view.revision + 1, events=[joined], snapshot=is_first))


@asynccontextmanager
async def dispatching(
    stall_timeout_s: float = LONG_S, max_attempts: int = 1, budget: RetryBudget | None = None
) -> AsyncIterator[tuple[Played, Dispatcher]]:
    async with playing() as (played, address), Channels() as channels, DecodeLinks(channels) as links:
        yield (
            played,
            Dispatcher(
                view_of(address), channels, links, model_revision=REVISION, routing=Policy.KV_AWARE,
                min_ship_tokens=32, max_attempts=max_attempts,
                stall_timeout_s=stall_timeout_s, budget=budget,
            ),
        )  # fmt: skip


JOB = Job("r", [1, 2, 3], common_pb2.SamplingParams(max_tokens=9))


def ask(dispatcher: Dispatcher, timeout_s: float = LONG_S) -> Reading:
    return Reading(dispatcher, JOB, timeout_s)


class Sink:
    """Has room for everything."""

    def put(self, tokens: list[common_pb2.Token]) -> bool:
        return True

    async def room(self) -> bool:
        return True


@asynccontextmanager
async def asked(*, timeout_s: float = LONG_S, stall_timeout_s: float = LONG_S) -> AsyncIterator[tuple[Played, Reading]]:
    async with dispatching(stall_timeout_s) as (played, dispatcher), aclosing(ask(dispatcher, timeout_s)) as answer:
        yield played, answer


def begin(answer: Reading) -> asyncio.Task[list[common_pb2.Token]]:
    return asyncio.create_task(anext(answer))


async def opened(played: Played) -> int:
    return (await played.sent.get()).open.handle


def finished(handle: int) -> worker_pb2.DecodeEvent:
    return worker_pb2.DecodeEvent(handle=handle, finished=worker_pb2.DecodeFinished())


def failure(handle: int) -> worker_pb2.DecodeEvent:
    lost = worker_pb2.Failure(code=grpc.StatusCode.UNAVAILABLE.value[0], message="gone")
    return worker_pb2.DecodeEvent(handle=handle, failure=lost)


async def test_several_tokens_of_one_step_leave_together_in_order() -> None:
    async with asked() as (played, answer):
        first = begin(answer)
        handle = await opened(played)
        played.say(token(handle, 0))
        assert [t.index for t in await first] == [0]
        played.say(*(token(handle, index) for index in (1, 2, 3)))
        assert [t.index for t in await anext(answer)] == [1, 2, 3]
        played.say(token(handle, 4), finished(handle))
        assert [t.index for t in await anext(answer)] == [4]
        with pytest.raises(StopAsyncIteration):
            await anext(answer)


async def test_what_comes_while_a_message_is_being_sent_gathers() -> None:
    async with asked() as (played, answer):
        first = begin(answer)
        handle = await opened(played)
        played.say(token(handle, 0))
        await first
        for index in (1, 2, 3):
            played.say(token(handle, index))
        await asyncio.sleep(0.2)  # the client reads nothing
        assert [t.index for t in await anext(answer)] == [1, 2, 3]


async def test_a_sink_that_fails_ends_its_request_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        dispatching() as (played, dispatcher),
        aclosing(ask(dispatcher)) as broken,
        aclosing(ask(dispatcher)) as other,
    ):
        handles = []
        for answer in (broken, other):
            reading = begin(answer)
            handles.append(await opened(played))
            played.say(token(handles[-1], 0))
            await reading
        more = [begin(answer) for answer in (broken, other)]
        await asyncio.sleep(0)

        def fail(_: object) -> bool:
            raise ValueError("secret")

        monkeypatch.setattr(broken, "put", fail)
        played.say(*(token(handle, 1) for handle in handles))
        with pytest.raises(InternalError) as caught:
            await more[0]
        assert "secret" not in str(caught.value)
        assert [t.index for t in await more[1]] == [1]
        assert (await played.sent.get()).cancel.handle == handles[0]


async def test_who_has_left_gets_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though tokens were about to leave: the connection may be another request's by then."""
    async with dispatching() as (played, dispatcher), aclosing(ask(dispatcher)) as answer:
        reading = begin(answer)
        handle = await opened(played)
        played.say(token(handle, 0))
        await reading
        more = begin(answer)
        await asyncio.sleep(0.01)
        turns: list[Callable[[], None]] = []
        monkeypatch.setattr(dispatcher._turn, "add", turns.append)
        played.say(token(handle, 1))
        while not turns:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        more.cancel()
        await asyncio.wait((more,))
        turns[0]()
        assert answer._tokens == []


def watched_runs(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Run]]:
    """Of all requests from now on."""
    runs: list[weakref.ref[Run]] = []

    class Watched(Run):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            runs.append(weakref.ref(self))

    monkeypatch.setattr("gateway.dispatch.Run", Watched)
    return runs


async def test_a_sink_without_room_gets_nothing_until_it_has_some_and_then_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what came before the request's task had heard that there is no room."""
    runs = watched_runs(monkeypatch)
    async with dispatching() as (played, dispatcher), aclosing(ask(dispatcher)) as answer:
        reading = begin(answer)
        handle = await opened(played)
        played.say(token(handle, 0))
        await reading
        more = begin(answer)
        await asyncio.sleep(0.01)  # it has room
        (run,) = (each() for each in runs)
        assert run is not None
        came = [TokenCame(1, Stream.DECODE, common_pb2.Token(index=index)) for index in (1, 2, 3)]
        run.put(came[0])
        run._take_turn()
        run.put(came[1])
        run.put(came[2])
        assert [t.index for t in await more] == [1]
        assert [t.index for t in await anext(answer)] == [2, 3]


@pytest.mark.parametrize("how", ["finished", "failed", "left"])
async def test_a_request_that_has_ended_dies_at_once(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Nothing is looked for garbage while many requests are open (services/runtime/garbage.py)."""
    runs = watched_runs(monkeypatch)
    async with dispatching() as (played, dispatcher):
        gc.disable()
        try:
            request = asyncio.create_task(dispatcher.run(JOB, Trace(), LONG_S, Sink()))
            handle = await opened(played)
            if how == "left":
                request.cancel()
            else:
                played.say(finished(handle) if how == "finished" else failure(handle))
            with suppress(UnavailableError, asyncio.CancelledError):
                await request
            del request
            await asyncio.sleep(0.01)
            assert [run() for run in runs] == [None]
        finally:
            gc.enable()


async def test_a_worker_that_says_nothing_has_failed_the_request_and_is_told() -> None:
    async with asked(stall_timeout_s=0.1) as (played, answer):
        reading = begin(answer)
        handle = await opened(played)
        with pytest.raises(UnavailableError, match=r"said nothing for 0\.1 s") as caught:
            await reading
        assert caught.value.reason == "STALLED"
        assert (await played.sent.get()).cancel.handle == handle


async def test_a_worker_that_keeps_talking_has_not_stalled() -> None:
    async with asked(stall_timeout_s=0.4) as (played, answer):
        reading = begin(answer)
        handle = await opened(played)
        for index in range(6):
            await asyncio.sleep(0.1)
            played.say(token(handle, index))
            assert [t.index for t in await reading] == [index]
            reading = begin(answer)
        played.say(finished(handle))
        with pytest.raises(StopAsyncIteration):
            await reading


async def test_the_deadline_ends_a_request_whose_tokens_still_come_and_its_compute() -> None:
    async with asked(timeout_s=0.3) as (played, answer):
        reading = begin(answer)
        handle = await opened(played)
        played.say(token(handle, 0))
        await reading
        with pytest.raises(DeadlineError):
            await anext(answer)
        assert (await played.sent.get()).cancel.handle == handle


async def test_leaving_early_stops_the_compute() -> None:
    async with asked() as (played, answer):
        reading = begin(answer)
        handle = await opened(played)
        played.say(token(handle, 0))
        await reading
        await answer.aclose()
        assert (await played.sent.get()).cancel.handle == handle


async def until_waiting(dispatcher: Dispatcher) -> None:
    async with asyncio.timeout(LONG_S):
        while not dispatcher._waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_an_answer_waits_for_its_worker_to_come_back_and_goes_on_behind_what_has_left() -> None:
    async with (
        dispatching(max_attempts=2) as (played, dispatcher),
        playing() as (again, address),
        aclosing(ask(dispatcher)) as answer,
    ):
        first = begin(answer)
        handle = await opened(played)
        played.say(token(handle, 0), token(handle, 1))
        tokens = await first
        if len(tokens) < 2:
            tokens += await anext(answer)
        played.say(failure(handle))
        more = begin(answer)
        await until_waiting(dispatcher)
        dispatcher.members_changed()
        assert dispatcher._waiting, "nobody has come"
        join(dispatcher._view, address, incarnation=2)
        dispatcher.members_changed()
        assert not dispatcher._waiting
        open_ = (await again.sent.get()).open
        assert list(open_.prompt_token_ids) == [1, 2, 3, *(t.id for t in tokens)]
        assert open_.sampling.max_tokens == 7
        again.say(token(open_.handle, 0))
        assert [t.index for t in await more] == [2]


async def test_an_answer_waits_for_a_worker_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.dispatch.WORKER_WAIT_S", 0.05)
    async with dispatching(max_attempts=2) as (played, dispatcher):
        for leaves in (False, True):
            answer = ask(dispatcher)
            first = begin(answer)
            handle = await opened(played)
            played.say(token(handle, 0))
            await first
            if leaves:
                monkeypatch.setattr("gateway.dispatch.WORKER_WAIT_S", LONG_S)
            played.say(failure(handle))
            more = begin(answer)
            if leaves:
                await until_waiting(dispatcher)
                more.cancel()
                await asyncio.wait([more])
            else:
                with pytest.raises(UnavailableError) as caught:
                    await more
                assert caught.value.reason == "DECODE_WORKER_LOST"
            await answer.aclose()
            assert not dispatcher._waiting


async def fail_once_begun(played: Played, answer: Reading) -> None:
    first = begin(answer)
    handle = await opened(played)
    played.say(token(handle, 0))
    await first
    played.say(failure(handle))


async def test_an_answer_that_has_begun_outlives_more_attempts_than_one_that_has_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.run.FORGIVE_S", (0.02, 0.02))
    monkeypatch.setattr("gateway.run.RETRY_BACKOFF_S", (0.001, 0.01))
    async with dispatching(max_attempts=1) as (played, dispatcher), aclosing(ask(dispatcher)) as answer:
        await fail_once_begun(played, answer)
        more = begin(answer)
        for _ in range(8):
            played.say(failure(await opened(played)))
        played.say(token(await opened(played), 0))
        assert [t.index for t in await more] == [1]
        refused = begin(ask(dispatcher))
        played.say(failure(await opened(played)))
        with pytest.raises(UnavailableError):
            await refused


async def test_an_answer_that_goes_on_more_than_once_is_asked_for_behind_all_that_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.run.FORGIVE_S", (0.02, 0.02))
    asked_for = []
    async with asked() as (played, answer):
        for index in range(3):
            reading = begin(answer)
            open_ = (await played.sent.get()).open
            asked_for.append((list(open_.prompt_token_ids), open_.sampling.max_tokens))
            drawn = common_pb2.Token(index=0, id=10 + index)
            played.say(worker_pb2.DecodeEvent(handle=open_.handle, token=drawn))
            assert [(t.index, t.id) for t in await reading] == [(index, 10 + index)]
            played.say(failure(open_.handle))
    assert asked_for == [([1, 2, 3], 9), ([1, 2, 3, 10], 8), ([1, 2, 3, 10, 11], 7)]


async def test_the_deadline_is_the_requests_and_not_an_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.run.FORGIVE_S", (0.05, 0.05))  # so that attempts take longer than the deadline
    async with asked(timeout_s=0.3) as (played, answer):
        await fail_once_begun(played, answer)

        async def fail_all() -> None:
            while True:
                played.say(failure(await opened(played)))

        failing = asyncio.create_task(fail_all())
        with pytest.raises(DeadlineError):
            await anext(answer)
        failing.cancel()


async def test_retries_that_bring_nothing_wait_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.run.RETRY_BACKOFF_S", (0.4, 0.4))
    async with dispatching(max_attempts=3) as (played, dispatcher):
        (known,) = dispatcher._view.workers.values()
        for name in ("decode-1", "decode-2"):
            join(dispatcher._view, known.info.control_address, worker_id=name)
        refused = begin(ask(dispatcher))
        opened_s = []
        for _ in range(3):
            handle = await opened(played)
            opened_s.append(time.monotonic())
            played.say(failure(handle))
        with pytest.raises(UnavailableError):
            await refused
        assert opened_s[2] - opened_s[1] >= 0.2


async def test_beyond_the_budget_who_has_begun_waits_and_who_has_not_is_told_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.run.FORGIVE_S", (0.02, 0.02))
    budget = RetryBudget(0.0, floor_per_s=0.1)  # one
    async with dispatching(max_attempts=9, budget=budget) as (played, dispatcher), aclosing(ask(dispatcher)) as answer:
        spent = budget.spend(time.monotonic())
        refused = begin(ask(dispatcher))
        played.say(failure(await opened(played)))
        with pytest.raises(UnavailableError, match="gone"):
            await refused
        await fail_once_begun(played, answer)
        more = begin(answer)
        await until_waiting(dispatcher)
        await asyncio.sleep(0.1)
        assert played.sent.empty()
        budget.give_back(spent)
        played.say(token(await opened(played), 0))
        assert [t.index for t in await more] == [1]
        assert budget.can_spend(time.monotonic()), "it got further, so its retry costs nothing"


async def test_a_retry_that_brings_nothing_is_spent_and_the_next_request_goes_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever goes without is told what happened, and when to come back, not all at the same time."""
    monkeypatch.setattr("gateway.run.RETRY_BACKOFF_S", (0.001, 0.01))
    hints = set()
    async with dispatching(max_attempts=2, budget=RetryBudget(0.0, floor_per_s=0.1)) as (played, dispatcher):
        (known,) = dispatcher._view.workers.values()
        join(dispatcher._view, known.info.control_address, worker_id="decode-1")
        for num_attempts in (2, 1, 1, 1):
            refused = begin(ask(dispatcher))
            for _ in range(num_attempts):
                played.say(failure(await opened(played)))
            with pytest.raises(UnavailableError, match="gone") as caught:
                await refused
            assert played.sent.empty()
            if num_attempts == 1:
                hints.add(caught.value.retry_after_s)
    assert None not in hints
    assert len(hints) == 3
    assert all(WORKER_RETRY_S <= hint <= 1.5 * WORKER_RETRY_S for hint in hints if hint is not None)


async def test_a_worker_that_leaves_its_calls_open_at_its_end_is_lost() -> None:
    """gRPC says CANCELLED of them, and nobody here cancelled anything."""
    async with dispatching() as (played, dispatcher):
        answer = begin(ask(dispatcher))
        await opened(played)
        played.vanish(grpc.StatusCode.CANCELLED)
        with pytest.raises(UnavailableError) as caught:
            await answer
        assert caught.value.reason == "WORKER_LOST"
        assert caught.value.retry_after_s


async def test_those_who_lose_a_worker_together_are_not_told_to_come_back_together() -> None:
    lost = [as_lost(UnavailableError("gone"), "decode-0").retry_after_s for _ in range(9)]
    missed = []
    async with dispatching() as (_, dispatcher):
        left = directory_pb2.WorkerLeft(worker_id="decode-0", incarnation=1)
        dispatcher._view.apply(directory_pb2.WatchResponse(revision=9, events=[directory_pb2.Event(left=left)]))
        for _ in range(9):
            with pytest.raises(UnavailableError) as caught:
                await anext(ask(dispatcher))
            assert caught.value.reason == "NO_WORKER"
            missed.append(caught.value.retry_after_s)
    for hints, least_s in ((lost, WORKER_RETRY_S), (missed, NO_WORKER_RETRY_S)):
        assert len(set(hints)) == 9
        assert all(hint is not None and least_s <= hint <= 1.5 * least_s for hint in hints)


@pytest.mark.parametrize("reason", ["EXPIRED", "REPLACED", "DEREGISTERED"])
async def test_a_silent_worker_that_the_directory_gave_up_is_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr("gateway.dispatch.GONE_STALL_S", 0.2)
    async with (
        dispatching() as (played, dispatcher),
        playing() as (other, address),
        aclosing(ask(dispatcher)) as answer,
    ):
        first = begin(answer)
        handle = await opened(played)
        played.say(token(handle, 0))
        await first
        more = begin(answer)
        left = WorkerGone("decode-0", 1, directory_pb2.LeaveReason.Value(f"LEAVE_REASON_{reason}"))
        join(dispatcher._view, address, incarnation=2)
        dispatcher.members_changed([WorkerGone("decode-0", 7, left.reason), left])
        if reason == "DEREGISTERED":
            await asyncio.sleep(0.5)
            assert not more.done()
            played.say(token(handle, 1))
        else:
            assert (await played.sent.get()).cancel.handle == handle
            other.say(token(await opened(other), 0))
        assert [t.index for t in await more] == [1]
    assert not dispatcher._opened
