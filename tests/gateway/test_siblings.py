"""What the processes of one gateway tell each other."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.decisions import Decision, DecisionBook, Refusal
from gateway.recent import EndedRequest, RecentRequests
from gateway.routing import PassedOver
from gateway.seat import Seat
from gateway.served import Served, ServedBook
from gateway.siblings import Memory, Siblings, meeting
from kvferry.api.inference.v1 import inference_pb2
from kvferry.errors import UnavailableError


@dataclass
class Process:
    decisions: DecisionBook = field(default_factory=DecisionBook)
    recent: RecentRequests = field(default_factory=RecentRequests)
    served: ServedBook = field(default_factory=lambda: ServedBook(time.monotonic() - 60))
    num_in_flight: int = 0
    num_requests_total: int = 0

    @property
    def memory(self) -> Memory:
        return Memory(self.decisions, self.recent, self.served, self)

    def decided(self, tenant: str, request_id: str, reason: str, ago_s: float = 0.0) -> None:
        refusal = Refusal(reason, (PassedOver("worker-a", "full"),))
        self.decisions.add(tenant, request_id, Decision(refusal, time.monotonic() - ago_s, 0.1), first=True)

    def ended(self, tenant: str, request_id: str, ago_s: float = 0.0, outcome: str = "completed") -> None:
        finished = inference_pb2.Finished(usage=inference_pb2.Usage(num_output_tokens=3))
        self.recent.add(
            tenant, EndedRequest(request_id, outcome, time.monotonic() - ago_s, 5, finished if ago_s == 0 else None)
        )


@asynccontextmanager
async def met(folder: Path, *processes: Process | None) -> AsyncIterator[list[Siblings]]:
    """None: one that does not run."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(meeting(process.memory, Seat(number, len(processes), folder)))
            for number, process in enumerate(processes)
            if process is not None
        ]


async def test_a_decision_is_found_from_every_process(tmp_path: Path) -> None:
    a, b = Process(), Process()
    b.decided("t", "r", "nobody has room")
    async with met(tmp_path, a, b) as siblings:
        for each in siblings:
            (found,) = await each.find_decisions("t", "r")
            assert (found.reason, found.passed_over[0].why) == ("nobody has room", "full")
            assert not await each.find_decisions("other", "r")
            assert not await each.find_decisions("t", "unknown")
    assert "each of this gateway's 2 processes" in siblings[0].who


async def test_an_id_that_was_used_twice_means_the_last(tmp_path: Path) -> None:
    a, b = Process(), Process()
    a.decided("t", "r", "before", ago_s=30)
    b.decided("t", "r", "now")
    a.ended("t", "r", ago_s=30, outcome="cancelled")
    b.ended("t", "r")
    async with met(tmp_path, a, b) as siblings:
        for each in siblings:
            assert [d.reason for d in await each.find_decisions("t", "r")] == ["now"]
            assert [e.outcome for e in await each.list_ended("t", 10)] == ["completed"]
            one = await each.find_ended("t", "r")
            assert one is not None
            assert one.finished is not None
            assert one.finished.usage.num_output_tokens == 3


async def test_requests_that_ended_are_listed_by_age_whoever_answered_them(tmp_path: Path) -> None:
    a, b = Process(num_in_flight=2, num_requests_total=7), Process(num_in_flight=1, num_requests_total=4)
    for process, request_id, ago_s in ((a, "4", 4), (b, "3", 3), (a, "2", 2), (b, "1", 1)):
        process.ended("t", request_id, ago_s)
    b.ended("other", "secret", 1)
    async with met(tmp_path, a, b) as siblings:
        for each in siblings:
            found = await each.list_ended("t", 3)
            assert [e.request_id for e in found] == ["1", "2", "3"]
            assert 2.9 < time.monotonic() - found[2].ended_s < 60
            assert found[2].finished is None
            assert await each.find_ended("t", "secret") is None
            assert await each.find_ended("t", "") is None
            counts = await each.count()
            assert (counts.num_in_flight, counts.num_total) == (3, 11)


async def test_traffic_is_that_of_all_processes_or_none(tmp_path: Path) -> None:
    a, b = Process(), Process(served=ServedBook(time.monotonic() - 30))
    now_s = time.monotonic()
    for process, tenant, ago_s, num_tokens in ((a, "t", 20, 1), (b, "t", 10, 2), (a, "t", 8, 3), (b, "other", 5, 4)):
        process.served.add(Served(tenant, now_s - ago_s, num_tokens, 0, 5, 0.1, 0.2, 0.15, 1.0))
    async with met(tmp_path, a, b) as siblings:
        for each in siblings:
            traffic = await each.find_traffic("t")
            assert list(traffic.num_prompt_tokens) == [1, 2, 3]
            assert (list(traffic.total_us), len(traffic.age_us)) == ([1_000_000] * 3, 3)
            assert 30_000 <= traffic.since_ms < 60_000
            assert not (await each.find_traffic("nobody")).age_us
    async with met(tmp_path, a, None) as (alone,):
        with pytest.raises(UnavailableError, match="does not say what it has served"):
            await alone.find_traffic("t")


async def test_who_does_not_answer_is_left_out(tmp_path: Path) -> None:
    a = Process(num_requests_total=7)
    a.decided("t", "r", "here")

    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(Seat(2, 3, tmp_path).socket))
        deaf.listen()
        async with met(tmp_path, a, None, None) as (siblings,):
            siblings._timeout_s = 0.2
            assert [d.reason for d in await siblings.find_decisions("t", "r")] == ["here"]
            assert (await siblings.count()).num_total == 7


async def test_a_successor_answers_at_its_predecessors_socket(tmp_path: Path) -> None:
    a, b = Process(), Process(num_requests_total=1)
    seat = Seat(1, 2, tmp_path)
    async with met(tmp_path, a, None) as (siblings,):
        async with meeting(b.memory, seat):
            assert (await siblings.count()).num_total == 1
        seat.socket.touch()  # as one that was killed leaves it
        async with meeting(b.memory, seat), asyncio.timeout(30):
            while (await siblings.count()).num_total != 1:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
