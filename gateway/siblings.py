"""What a gateway knows of its requests, whichever of its processes they came to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol, TypeVar

import grpc
import structlog

from gateway.decisions import DecisionBook
from gateway.explained import to_decision_proto
from gateway.recent import EndedRequest, RecentRequests
from gateway.seat import Seat
from gateway.served import ServedBook
from kvferry.api.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from kvferry.api.inference.v1 import inference_pb2
from kvferry.errors import UnavailableError
from services.runtime.channel import open_channel
from services.runtime.server import create_server, running
from services.runtime.units import to_us

log = structlog.get_logger(__name__)

# Who does not answer for so long is left out: it has ended, or is so busy that its memory can wait.
ANSWER_TIMEOUT_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class Tally(Protocol):
    """How many requests this process answers, and has been asked."""

    @property
    def num_in_flight(self) -> int: ...

    @property
    def num_requests_total(self) -> int: ...


class Memory:
    """This process's own."""

    def __init__(self, decisions: DecisionBook, recent: RecentRequests, served: ServedBook, tally: Tally) -> None:
        self._decisions = decisions
        self._recent = recent
        self._served = served
        self._tally = tally

    def find_decisions(self, request: gateway_pb2.FindDecisionsRequest) -> gateway_pb2.FindDecisionsResponse:
        found, now_s = self._decisions.of(request.tenant, request.request_id), time.monotonic()
        return gateway_pb2.FindDecisionsResponse(decisions=[to_decision_proto(d, now_s) for d in found])

    def list_ended(self, request: gateway_pb2.ListEndedRequest) -> gateway_pb2.ListEndedResponse:
        if request.request_id:
            one = self._recent.get(request.tenant, request.request_id)
            found = [] if one is None else [one]
        else:
            found = self._recent.of(request.tenant, request.limit)
        now_s = time.monotonic()
        return gateway_pb2.ListEndedResponse(requests=[_to_ended_proto(ended, now_s) for ended in found])

    def find_traffic(self, request: gateway_pb2.FindTrafficRequest) -> gateway_pb2.FindTrafficResponse:
        served, now_s = self._served.of(request.tenant), time.monotonic()
        traffic = inference_pb2.DescribeTrafficResponse(
            since_ms=int((now_s - self._served.since_s) * 1000),
            age_us=[to_us(now_s - each.arrived_s) for each in served],
            num_prompt_tokens=[each.num_prompt_tokens for each in served],
            num_cached_tokens=[each.num_cached_tokens for each in served],
            num_output_tokens=[each.num_output_tokens for each in served],
            ttft_us=[to_us(each.ttft_s) for each in served],
            itl_p99_us=[to_us(each.itl_p99_s) for each in served],
            tpot_us=[to_us(each.tpot_s) for each in served],
            total_us=[to_us(each.total_s) for each in served],
        )
        return gateway_pb2.FindTrafficResponse(traffic=traffic)

    def count(self) -> gateway_pb2.CountRequestsResponse:
        return gateway_pb2.CountRequestsResponse(
            num_in_flight=self._tally.num_in_flight, num_total=self._tally.num_requests_total
        )


class SiblingServicer(gateway_pb2_grpc.SiblingServiceServicer):
    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    async def FindDecisions(
        self, request: gateway_pb2.FindDecisionsRequest, context: Context
    ) -> gateway_pb2.FindDecisionsResponse:
        return self._memory.find_decisions(request)

    async def ListEnded(self, request: gateway_pb2.ListEndedRequest, context: Context) -> gateway_pb2.ListEndedResponse:
        return self._memory.list_ended(request)

    async def FindTraffic(
        self, request: gateway_pb2.FindTrafficRequest, context: Context
    ) -> gateway_pb2.FindTrafficResponse:
        return self._memory.find_traffic(request)

    async def CountRequests(
        self, request: gateway_pb2.CountRequestsRequest, context: Context
    ) -> gateway_pb2.CountRequestsResponse:
        return self._memory.count()


class Siblings:
    """This process's memory and what the others answer within ``ANSWER_TIMEOUT_S``; all of them at once are asked.  Only
    ``find_traffic`` raises: what a process that does not answer remembers is left out.  Owned by one event loop."""

    def __init__(
        self, memory: Memory, others: Sequence[gateway_pb2_grpc.SiblingServiceAsyncStub] = (),
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:  # fmt: skip
        self._memory = memory
        self._others = others
        self._timeout_s = timeout_s

    @property
    def who(self) -> str:
        """In words, whose memory it is."""
        if not self._others:
            return "this gateway"
        return f"each of this gateway's {len(self._others) + 1} processes"

    async def find_decisions(self, tenant: str, request_id: str) -> Sequence[inference_pb2.RouteDecision]:
        """In order.  Where a client has used the id on several processes, those that were made last."""
        request = gateway_pb2.FindDecisionsRequest(tenant=tenant, request_id=request_id)
        answers = [self._memory.find_decisions(request)]
        answers += await self._ask(other.FindDecisions(request, timeout=self._timeout_s) for other in self._others)
        known = [answer.decisions for answer in answers if answer.decisions]
        return min(known, key=lambda decisions: decisions[-1].age_ms, default=())

    async def list_ended(self, tenant: str, limit: int) -> list[EndedRequest]:
        """The newest first, each id once."""
        return await self._ended(gateway_pb2.ListEndedRequest(tenant=tenant, limit=limit), limit)

    async def find_ended(self, tenant: str, request_id: str) -> EndedRequest | None:
        """None for one that is not known, not any more, or another tenant's."""
        if not request_id:
            return None
        found = await self._ended(gateway_pb2.ListEndedRequest(tenant=tenant, request_id=request_id, limit=1), 1)
        return found[0] if found else None

    async def find_traffic(self, tenant: str) -> inference_pb2.DescribeTrafficResponse:
        """Without the model.  Raises UnavailableError when one does not answer: half of the traffic is not the traffic."""
        request = gateway_pb2.FindTrafficRequest(tenant=tenant)
        answers = [self._memory.find_traffic(request)]
        answers += await self._ask(other.FindTraffic(request, timeout=self._timeout_s) for other in self._others)
        if len(answers) <= len(self._others):
            raise UnavailableError(
                "a process of this gateway does not say what it has served; ask again when it was started again",
                reason="SIBLING_SILENT",
            )
        return _together([answer.traffic for answer in answers])

    async def count(self) -> gateway_pb2.CountRequestsResponse:
        """Sums.  The total falls by what a process had counted that has ended since."""
        request = gateway_pb2.CountRequestsRequest()
        counts = [self._memory.count()]
        counts += await self._ask(other.CountRequests(request, timeout=self._timeout_s) for other in self._others)
        return gateway_pb2.CountRequestsResponse(
            num_in_flight=sum(c.num_in_flight for c in counts), num_total=sum(c.num_total for c in counts)
        )

    async def _ended(self, request: gateway_pb2.ListEndedRequest, limit: int) -> list[EndedRequest]:
        answers = [self._memory.list_ended(request)]
        answers += await self._ask(other.ListEnded(request, timeout=self._timeout_s) for other in self._others)
        newest: dict[str, gateway_pb2.EndedRequest] = {}
        for ended in sorted((e for answer in answers for e in answer.requests), key=lambda e: e.age_us):
            newest.setdefault(ended.request_id, ended)
        now_s = time.monotonic()
        return [_from_ended_proto(ended, now_s) for ended in list(newest.values())[:limit]]

    @staticmethod
    async def _ask(calls: Iterable[Awaitable[T]]) -> list[T]:
        async def one(call: Awaitable[T]) -> T | None:
            try:
                return await call
            except grpc.aio.AioRpcError as error:
                log.debug("sibling_left_out", code=error.code().name, details=error.details())
                return None

        answers = await asyncio.gather(*map(one, calls))
        return [answer for answer in answers if answer is not None]


@asynccontextmanager
async def meeting(memory: Memory, seat: Seat | None) -> AsyncIterator[Siblings]:
    """Answers the others and asks them, while entered.  ``seat`` None: there are no others."""
    if seat is None:
        yield Siblings(memory)
        return
    async with AsyncExitStack() as stack:
        server = create_server()
        gateway_pb2_grpc.add_SiblingServiceServicer_to_server(SiblingServicer(memory), server)
        seat.socket.unlink(missing_ok=True)  # of who had the number before
        server.add_insecure_port(f"unix:{seat.socket}")
        await stack.enter_async_context(running(server, grace_s=0))
        channels = [
            await stack.enter_async_context(open_channel(f"unix:{path}")) for path in seat.sockets_of_others
        ]  # fmt: skip
        yield Siblings(memory, [gateway_pb2_grpc.SiblingServiceStub(channel) for channel in channels])


_COLUMNS = (
    "age_us", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "ttft_us", "itl_p99_us", "tpot_us", "total_us",
)  # fmt: skip


def _together(parts: Sequence[inference_pb2.DescribeTrafficResponse]) -> inference_pb2.DescribeTrafficResponse:
    """In order of their ends, as far back as all of them reach."""
    rows = [row for part in parts for row in zip(*(getattr(part, name) for name in _COLUMNS), strict=True)]
    rows.sort(key=lambda row: row[-1] - row[0])
    together = inference_pb2.DescribeTrafficResponse(since_ms=min(part.since_ms for part in parts))
    for name, column in zip(_COLUMNS, zip(*rows, strict=True), strict=False):
        getattr(together, name).extend(column)
    return together


def _to_ended_proto(ended: EndedRequest, now_s: float) -> gateway_pb2.EndedRequest:
    return gateway_pb2.EndedRequest(
        request_id=ended.request_id, outcome=ended.outcome, age_us=max(0, int((now_s - ended.ended_s) * 1e6)),
        num_prompt_tokens=ended.num_prompt_tokens, finished=ended.finished,
    )  # fmt: skip


def _from_ended_proto(ended: gateway_pb2.EndedRequest, now_s: float) -> EndedRequest:
    finished = ended.finished if ended.HasField("finished") else None
    return EndedRequest(ended.request_id, ended.outcome, now_s - ended.age_us / 1e6, ended.num_prompt_tokens, finished)
