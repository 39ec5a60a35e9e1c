"""Requests for which the workers have no room yet, on a worker that a test plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest

from gateway.admission import Objectives
from gateway.dispatch import Dispatcher
from gateway.job import Job, Trace
from gateway.link import DecodeLinks
from gateway.routing import Policy, Route
from gateway.tenants import Tenant
from gateway.view import ClusterView, WorkerGone
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.errors import DeadlineError, OverloadedError
from services.runtime.channels import Channels
from tests.gateway.played import Played, playing, token
from tests.gateway.reading import Reading
from tests.gateway.test_dispatch import LONG_S, REVISION, begin, finished, join, opened

# At the worker's 10 tokens/s, more than may wait behind another.
PROMPT = list(range(30))


@asynccontextmanager
async def dispatching(objectives: Objectives = Objectives()) -> AsyncIterator[tuple[Played, Dispatcher]]:  # noqa: B008
    async with playing() as (played, address), Channels() as channels, DecodeLinks(channels) as links:
        view = ClusterView()
        join(view, address)
        report(view, prefill_tokens_per_s=10.0)
        yield (
            played,
            Dispatcher(
                view, channels, links, model_revision=REVISION, routing=Policy.KV_AWARE, min_ship_tokens=32,
                max_attempts=1, stall_timeout_s=LONG_S, objectives=objectives,
            ),
        )  # fmt: skip


def report(view: ClusterView, **load: float) -> None:
    key = directory_pb2.WorkerLoadChanged(
        worker_id="decode-0", incarnation=1,
        load=directory_pb2.WorkerLoad(blocks=common_pb2.BlockCounts(free=100), **load),  # type: ignore[arg-type]
    )  # fmt: skip
    view.apply(directory_pb2.WatchResponse(revision=view.revision + 1, events=[directory_pb2.Event(load=key)]))


def ask(
    dispatcher: Dispatcher, name: str, *, tenant: str = "", priority: int = 0, timeout_s: float = LONG_S,
    trace: Trace | None = None, prompt: list[int] = PROMPT,
) -> Reading:  # fmt: skip
    sampling = common_pb2.SamplingParams(max_tokens=9)
    job = Job(name, prompt, sampling, Tenant(tenant, tenant.encode()), priority)
    return Reading(dispatcher, job, timeout_s, trace)


async def ended(*tasks: asyncio.Task[list[common_pb2.Token]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def next_open(played: Played) -> tuple[int, str]:
    while not (request := await played.sent.get()).HasField("open"):
        pass
    return request.open.handle, request.open.request_id


async def test_a_prompt_waits_in_the_gateway_until_the_worker_has_computed_the_one_before() -> None:
    trace = Trace()
    async with dispatching() as (played, dispatcher), aclosing(ask(dispatcher, "a")) as a:
        first = begin(a)
        handle = await opened(played)
        async with aclosing(ask(dispatcher, "b", trace=trace)) as b:
            second = begin(b)
            await asyncio.sleep(0.1)
            assert played.sent.empty(), "nothing of it has left"
            played.say(token(handle, 0))
            await first
            handle, name = await next_open(played)
            assert name == "b"
            assert trace.line_s >= 0.1
            played.say(token(handle, 0), finished(handle))
            assert [t.index for t in await second] == [0]


async def test_they_go_by_tenant_and_by_priority_within_one() -> None:
    async with dispatching() as (played, dispatcher):
        answers = [ask(dispatcher, "now", tenant="a")]
        tasks = [begin(answers[0])]
        handle, _ = await next_open(played)
        for name, tenant, priority in (("a1", "a", 0), ("a2", "a", 5), ("a3", "a", 0), ("b1", "b", -1)):
            answers.append(ask(dispatcher, name, tenant=tenant, priority=priority))
            tasks.append(begin(answers[-1]))
            await asyncio.sleep(0)
        order = []
        for _ in range(4):
            played.say(token(handle, 0), finished(handle))
            handle, name = await next_open(played)
            order.append(name)
            await asyncio.sleep(0.05)
            assert played.sent.empty(), "one at a time"
        # a was served before b came, so b begins even with a; then they take turns.
        assert order in (["a2", "b1", "a1", "a3"], ["b1", "a2", "a1", "a3"])
        played.say(token(handle, 0), finished(handle))
        await asyncio.gather(*tasks)
        for answer in answers:
            await answer.aclose()


async def test_a_short_prompt_goes_before_a_long_one_and_is_not_refused_for_it() -> None:
    """3 s for each long one: the second is expected after 6, and a short one behind it would be after 6.5."""
    async with dispatching(Objectives(ttft_s=6.2)) as (played, dispatcher), AsyncExitStack() as stack:
        answers = [
            await stack.enter_async_context(aclosing(ask(dispatcher, name, prompt=PROMPT[:length])))
            for name, length in (("now", 30), ("long", 30), ("short", 5))
        ]
        tasks = [begin(answers[0])]
        handle, _ = await next_open(played)
        for answer in answers[1:]:
            tasks.append(begin(answer))
            await asyncio.sleep(0)
        for name in ("short", "long"):
            played.say(token(handle, 0), finished(handle))
            handle, opened_name = await next_open(played)
            assert opened_name == name
        played.say(token(handle, 0), finished(handle))
        await asyncio.gather(*tasks)


async def test_one_that_becomes_the_first_is_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before it needs more blocks than there are."""
    async with dispatching() as (played, dispatcher), AsyncExitStack() as stack:
        prompts = {"now": PROMPT, "long": list(range(2000)), "short": PROMPT[:5]}
        answers = [
            await stack.enter_async_context(aclosing(ask(dispatcher, name, prompt=prompt)))
            for name, prompt in prompts.items()
        ]
        now = begin(answers[0])
        handle, _ = await next_open(played)
        played.say(token(handle, 0))
        await asyncio.sleep(0.05)
        monkeypatch.setattr("gateway.entrance.LOOK_INTERVAL_S", LONG_S)
        tasks = [begin(answers[1])]
        await asyncio.sleep(0.05)
        assert played.sent.empty()
        tasks.append(begin(answers[2]))
        assert (await asyncio.wait_for(next_open(played), 2))[1] == "short"
        await ended(now, *tasks)


async def test_one_that_gives_up_leaves_the_line_and_so_does_one_whose_time_is_over() -> None:
    async with dispatching() as (played, dispatcher), aclosing(ask(dispatcher, "a")) as a:
        first = begin(a)
        handle = await opened(played)
        gone = begin(ask(dispatcher, "b"))
        late = begin(ask(dispatcher, "c", timeout_s=0.2))
        last = begin(ask(dispatcher, "d"))
        await asyncio.sleep(0.05)
        gone.cancel()
        with pytest.raises(DeadlineError):
            await late
        assert not first.done()
        played.say(token(handle, 0))
        assert (await next_open(played))[1] == "d"
        await ended(gone, last)


async def test_room_that_only_a_report_tells_of_is_seen() -> None:
    async with dispatching() as (played, dispatcher):
        report(dispatcher._view, prefill_tokens_per_s=10.0, num_queued_prefill_tokens=1000)
        async with aclosing(ask(dispatcher, "a")) as a:
            task = begin(a)
            await asyncio.sleep(0.05)
            assert played.sent.empty()
            report(dispatcher._view, prefill_tokens_per_s=10.0)
            assert (await next_open(played))[1] == "a"
            await ended(task)


async def test_who_would_come_too_late_is_refused_at_once() -> None:
    async with dispatching(Objectives(ttft_s=7.0)) as (played, dispatcher), aclosing(ask(dispatcher, "a")) as a:
        task = begin(a)
        await opened(played)
        async with aclosing(ask(dispatcher, "b")) as b, aclosing(ask(dispatcher, "c")) as c:
            waiting = begin(b)  # 3 s behind a, and 3 s of its own
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError, match="7 s is this gateway's objective") as caught:
                await anext(c)
            assert caught.value.reason == "TTFT_SLO"
            assert not waiting.done()
            await ended(waiting, task)


async def test_who_waits_behind_the_first_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def with_room(_: Objectives, __: Route, num_behind: int) -> None:
        seen.append(num_behind)

    monkeypatch.setattr(Objectives, "with_room", with_room)
    async with dispatching() as (played, dispatcher), AsyncExitStack() as stack:
        answers = [
            await stack.enter_async_context(aclosing(ask(dispatcher, name)))
            for name in ("now", "first", "second", "third")
        ]
        tasks = [begin(answers[0])]
        await opened(played)
        tasks += [begin(answer) for answer in answers[1:]]
        await asyncio.sleep(0.05)
        seen.clear()
        await asyncio.sleep(0.1)
        assert set(seen) == {2}
        await ended(*tasks)


async def test_of_a_worker_that_is_back_already_what_it_reported_is_still_known() -> None:
    """What it reported is this gateway's own prompt, which does not count once it is computed."""
    async with dispatching() as (played, dispatcher), aclosing(ask(dispatcher, "a")) as a:
        first = begin(a)
        handle = await opened(played)
        report(dispatcher._view, prefill_tokens_per_s=10.0, num_queued_prefill_tokens=len(PROMPT))
        dispatcher.members_changed([WorkerGone("decode-0", 1, directory_pb2.LEAVE_REASON_EXPIRED)])
        async with aclosing(ask(dispatcher, "b")) as b:
            second = begin(b)
            await asyncio.sleep(0.05)
            assert played.sent.empty()
            played.say(token(handle, 0))
            await first
            async with asyncio.timeout(1.0):
                assert (await next_open(played))[1] == "b"
            await ended(second)
