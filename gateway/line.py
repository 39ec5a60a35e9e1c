"""Who waits for the workers, and whose turn it is.  Pure.

Tenants take turns by what they have been served (the Virtual Token Counter of Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024): each has a counter of its tokens, prompt and answer, divided by its weight, and whoever has
the lowest goes next; of equals not who had the last turn.  One that had nothing to do starts at the lowest of those who
wait, so that nobody saves up.  Among a tenant's own, priority decides, then who is due first, then who came first: no
request overtakes another tenant's by either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from typing import Generic, TypeVar

# A token of an answer takes a worker longer than one of a prompt; the paper's weights.
OUTPUT_WEIGHT = 2.0
_SMOOTHING = 0.2
# Tenants that do not wait are remembered for being billed; the least served are forgotten first, beyond so many.
MAX_TENANTS = 10_000

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Ticket(Generic[Item]):
    """``work_s``: what computing its prompt is expected to take, once begun.  ``due_s``: within a
    priority who is due earliest goes first, so that nobody overtakes who comes after it."""

    item: Item
    tenant: str
    priority: int
    turn: int
    work_s: float
    came_s: float
    due_s: float


@dataclass(slots=True)
class _Queue(Generic[Item]):
    heap: list[tuple[int, float, int, Ticket[Item]]] = field(default_factory=list)


class Line(Generic[Item]):
    """Bounded by its user.  Times in seconds of any one clock."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue[Item]] = {}
        self._tickets: dict[int, Ticket[Item]] = {}  # those that wait
        self._served: dict[str, float] = {}
        self._last_tenant: str | None = None  # whose turn came
        self._turn = 0
        self._left_s: float | None = None  # when somebody last left while others waited
        self._pace_s = 0.0

    def __len__(self) -> int:
        return len(self._tickets)

    def join(
        self, item: Item, tenant: str, *, priority: int = 0, work_s: float = 0.0, now_s: float, due_s: float | None = None
    ) -> Ticket[Item]:  # fmt: skip
        """Behind its tenant's requests of its priority that are due by then; higher ones go first.  ``due_s`` None: now."""
        if level := self._level(tenant):
            self._served[tenant] = level
        if not self._tickets:
            self._left_s = now_s
        self._turn += 1
        ticket = Ticket(item, tenant, priority, self._turn, work_s, now_s, now_s if due_s is None else due_s)
        self._tickets[ticket.turn] = ticket
        queue = self._queues.setdefault(tenant, _Queue())
        heappush(queue.heap, (-priority, ticket.due_s, ticket.turn, ticket))
        return ticket

    def first(self) -> Ticket[Item] | None:
        """Whose turn it is."""
        tenant = min(self._queues, key=self._rank, default=None)
        return None if tenant is None else self._queues[tenant].heap[0][-1]

    def leave(self, ticket: Ticket[Item], now_s: float | None = None) -> None:
        """``now_s``: when its turn had come; None for one that gave up.  Idempotent."""
        if self._tickets.pop(ticket.turn, None) is None:
            return
        if now_s is not None:
            self._last_tenant = ticket.tenant
        if now_s is not None and self._left_s is not None:
            gap_s = now_s - self._left_s
            self._pace_s = gap_s if self._pace_s == 0 else self._pace_s + _SMOOTHING * (gap_s - self._pace_s)
            self._left_s = now_s
        heap = self._queues[ticket.tenant].heap
        while heap and heap[0][-1].turn not in self._tickets:
            heappop(heap)
        if not heap:
            del self._queues[ticket.tenant]

    def served(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int, weight: float = 1.0) -> None:
        """A tenant has been given so much."""
        before = self._served.pop(tenant, 0.0)
        self._served[tenant] = before + (num_prompt_tokens + OUTPUT_WEIGHT * num_output_tokens) / weight
        if len(self._served) > MAX_TENANTS:
            idle = next((t for t in self._served if t not in self._queues), None)
            if idle is not None:
                del self._served[idle]

    def wait_s(self, tenant: str, priority: int, *, due_s: float = inf, num_lanes: int) -> float:
        """What a newcomer would wait: the work of all who go before it, done on ``num_lanes`` workers at once, or what so
        many have lately taken to leave the line, whichever is longer.  0 when nobody waits."""
        ahead = list(self._ahead_of(tenant, priority, due_s))
        return max(sum(t.work_s for t in ahead) / max(1, num_lanes), len(ahead) * self._pace_s)

    def _ahead_of(self, tenant: str, priority: int, due_s: float) -> Iterator[Ticket[Item]]:
        """Of its own tenant those that it cannot overtake, of each other one as many, for they take turns, and one more
        where that tenant's turn comes first."""
        by_tenant: dict[str, list[Ticket[Item]]] = {}
        for ticket in self._tickets.values():
            by_tenant.setdefault(ticket.tenant, []).append(ticket)
        own = [t for t in by_tenant.pop(tenant, []) if (-t.priority, t.due_s) <= (-priority, due_s)]
        yield from own
        first = min(own, key=lambda t: (-t.priority, t.due_s, t.turn), default=None)
        rank = (self._level(tenant), tenant == self._last_tenant, first.turn if first else self._turn + 1)
        for other, tickets in by_tenant.items():
            num_before = len(own) + (self._rank(other) < rank)
            yield from sorted(tickets, key=lambda t: (-t.priority, t.due_s, t.turn))[:num_before]

    def _level(self, tenant: str) -> float:
        """Its counter, as it is when it waits."""
        served = self._served.get(tenant, 0.0)
        if tenant in self._queues or not self._queues:
            return served
        return max(served, min(self._served.get(waiting, 0.0) for waiting in self._queues))

    def _rank(self, tenant: str) -> tuple[float, bool, int]:
        return self._served.get(tenant, 0.0), tenant == self._last_tenant, self._queues[tenant].heap[0][-1].turn

    def check_integrity(self) -> None:
        """Raises AssertionError when somebody waits in no queue, or in two, or a queue's head has gone."""
        turns = [[entry[-1].turn for entry in queue.heap] for queue in self._queues.values()]
        assert sorted(t for each in turns for t in each if t in self._tickets) == sorted(self._tickets)
        assert all(each and each[0] in self._tickets for each in turns)
