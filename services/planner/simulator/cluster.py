"""A cluster in virtual time: simulated workers, and a gateway that routes with the real rules.  Pure.

``Cluster.run`` is the whole story: a request arrives, waits in the gateway's line until a worker has room, is routed by a
view that is as old as ``ViewDelays`` say, is computed where that says, behind cached blocks that are read from a third
worker first, moves to its decode worker where it was computed elsewhere, and ends; then its caller may ask again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from gateway.admission import Objectives
from gateway.candidates import Candidate, Role, WorkerKey
from gateway.costs import STALL_WEIGHT, Demand, num_needed_blocks
from gateway.line import Line
from gateway.pending import Pending, PendingBook
from gateway.routing import Policy, Route, choose_route
from services.engine.blocks import CacheChange, OutOfBlocksError
from services.engine.hashing import extend_chain
from services.engine.scheduler import QueueFullError
from services.engine.sequence import Event, Resumed, SequenceId, Started, TokenDrawn
from services.planner.simulator.arrivals import Arrival, Served
from services.planner.simulator.cost_model import CostModel
from services.planner.simulator.events import EventQueue
from services.planner.simulator.pulling import Pulling
from services.planner.simulator.worker import ROOT, Load, SimulatedWorker, WorkerSpec

# After a worker had no room: what it asks its callers to wait (services/worker/worker.py).
RETRY_S = 0.5
# How often a worker that changes its role is looked at.
ROLE_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class ViewDelays:
    """``events_s`` from a change of a cache, or a load report, to the gateway's view; a load is reported at most once in
    ``report_every_s``.  Zeros: the gateway sees everything as it is.  ``dispatch_s`` from the gateway's choice until
    whoever computes the prompt has it, and the gateway hears of that."""

    events_s: float = 0.01
    report_every_s: float = 1.0
    dispatch_s: float = 0.0


# A gateway's that promises nothing.
IN_LINE = Objectives()

# What a gateway sees of its workers, and a request, in; where it goes, out.  Raises NoWorkerError.
Choose = Callable[[Sequence[Candidate], Demand, str], Route]


@dataclass(slots=True)
class ByPolicy:
    """The gateway's own choice."""

    policy: Policy
    min_ship_tokens: int = 32
    stall_weight: float = STALL_WEIGHT
    turn: int = 0

    def __call__(self, candidates: Sequence[Candidate], demand: Demand, request_id: str) -> Route:
        return choose_route(
            candidates, demand, policy=self.policy, min_ship_tokens=self.min_ship_tokens,
            stall_weight=self.stall_weight, turn=self.turn, request_id=request_id,
        )  # fmt: skip


@dataclass(slots=True)
class _Seen:
    """Of one worker, by the gateway."""

    load: Load
    hashes: set[bytes] = field(default_factory=set)
    reported_s: float = -1e9
    report_due: bool = False


@dataclass(slots=True)
class _Request:
    arrival: Arrival
    served: Served
    hashes: list[bytes]
    decode: SimulatedWorker | None = None
    prefill: SimulatedWorker | None = None
    lent: list[int] = field(default_factory=list)
    pending: list[tuple[WorkerKey, Pending]] = field(default_factory=list)  # its decode worker's first
    answer: list[int] = field(default_factory=list)
    num_drawn: int = 0  # by its decode worker, which tells the first token too where another drew it
    delivered: TokenDrawn | None = None  # to its decode worker, which goes on behind it in a step to come
    started: bool = False


class Cluster:
    """One run: not to be used twice.  All workers have one block size."""

    def __init__(
        self, specs: Sequence[WorkerSpec], costs: CostModel, choose: Choose | Policy, delays: ViewDelays | None = None,
        objectives: Objectives | None = IN_LINE,
    ) -> None:  # fmt: skip
        """``objectives``: for whom there is no room by them waits in the line; None: nobody waits there."""
        self.queue = EventQueue()
        self.workers = [SimulatedWorker(s, costs, self.queue, self._on_events, self._on_changes) for s in specs]
        self._by_key = {w.key: w for w in self.workers}
        self._seen = {w.key: _Seen(w.load()) for w in self.workers}
        self._costs, self._delays = costs, delays or ViewDelays()
        self._choose = ByPolicy(choose) if isinstance(choose, Policy) else choose
        self._block_size = specs[0].limits.block_size
        self._requests: dict[str, _Request] = {}
        self._served: list[Served] = []
        self._pending = PendingBook(lambda: self.queue.now_s, self._look_soon)
        self._objectives = objectives
        self._line: Line[_Request] = Line()
        self._pulling = Pulling(self.queue, costs, self._touch)
        self._looks_soon = False

    def run(self, arrivals: Iterable[Arrival]) -> list[Served]:
        """Until all that arrived have been answered, in the order in which they ended.  Raises NoWorkerError and
        NeverFitsError."""
        for arrival in arrivals:
            self._expect(arrival)
        self.queue.run()
        assert not self._requests, f"{len(self._requests)} requests were never answered"
        return self._served

    def change_role(self, worker: SimulatedWorker, role: Role, then: Callable[[], None]) -> None:
        """It takes nothing new, and is ``role`` once it has finished what it has; then ``then`` is called."""
        worker.draining = True
        self._look_again_after_change(worker, role, then)

    def _look_again_after_change(self, worker: SimulatedWorker, role: Role, then: Callable[[], None]) -> None:
        if worker.scheduler.num_sequences or worker.pulls.num_pulls or self._pending.of(worker.key).num_requests:
            self.queue.after(ROLE_LOOK_S, lambda: self._look_again_after_change(worker, role, then))
            return
        worker.role, worker.draining = role, False
        then()

    def waits(self, since_s: float) -> list[Served]:
        """Of the requests that arrived then or later.  Those which have no end or no first token yet are taken to have it
        now."""
        now_s = self.queue.now_s
        found = [s for s in self._served if s.arrived_s >= since_s]
        for request in self._requests.values():
            if request.served.arrived_s >= since_s:
                found.append(replace(request.served, first_s=request.served.first_s or now_s, ended_s=now_s))
        return found

    def check_integrity(self) -> None:
        """After a run: raises AssertionError where something is still held or counted."""
        for worker in self.workers:
            worker.scheduler.check_integrity()
            assert worker.pins.num_pins == worker.pulls.num_pulls == 0, f"{worker.spec.worker_id} still pulls"
            assert worker.scheduler.num_sequences == 0, f"{worker.spec.worker_id} still has requests"
            assert self._pending.of(worker.key) == Pending(), "the gateway still counts requests"
        assert not self._line, "requests still wait in the line"

    def _expect(self, arrival: Arrival) -> None:
        request = _Request(
            arrival,
            Served(arrival.id, arrival.at_s, len(arrival.prompt), arrival.num_output),
            extend_chain(ROOT, arrival.prompt, self._block_size),
        )
        self.queue.at(arrival.at_s, lambda: self._begin(request))

    def _begin(self, request: _Request) -> None:
        self._requests[request.arrival.id] = request
        route = self._route(request)
        if not self._line and self._let_in(request, route):
            return
        assert self._objectives is not None, "without a line everybody goes at once"
        now_s, best = self.queue.now_s, self._objectives.with_room(route, 0) or route
        ticket = self._line.join(request, "", now_s=now_s, due_s=now_s + self._objectives.patience_s(best))
        if self._line.first() is ticket:
            self._look_soon()  # there may be room for it that was too little for the first before it

    def _look_soon(self) -> None:
        """Whether the first of the line may go, when all that happens now has happened."""
        if self._line and not self._looks_soon:
            self._looks_soon = True
            self.queue.after(0.0, self._look)

    def _look(self) -> None:
        self._looks_soon = False
        while (ticket := self._line.first()) and self._let_in(ticket.item, self._route(ticket.item)):
            self._line.leave(ticket)

    def _let_in(self, request: _Request, best: Route) -> bool:
        """False: it shall wait."""
        route: Route | None = best
        if self._objectives is not None:
            route = self._objectives.with_room(best, max(0, len(self._line) - 1))
        if route is not None:
            self._send(request, route)
        return route is not None

    def _route(self, request: _Request) -> Route:
        arrival = request.arrival
        candidates = [self._candidate(w, request.hashes) for w in self.workers]
        return self._choose(candidates, Demand(len(arrival.prompt), arrival.num_output), arrival.id)

    def _send(self, request: _Request, route: Route) -> None:
        arrival = request.arrival
        decode = request.decode = self._by_key[route.decode.key]
        prefill = request.prefill = self._by_key[route.prefill.key] if route.prefill else None
        if prefill is not None:
            try:
                reserved = decode.sequence(arrival.id, arrival.prompt, arrival.num_output)
                _, request.lent = decode.scheduler.reserve(reserved)
            except OutOfBlocksError:
                self._try_later(request)
                return
            self._touch(decode)
            decode.wake()
        if isinstance(self._choose, ByPolicy):
            self._choose.turn += 1
        num_tokens, num_blocks = route.num_uncached_tokens, num_needed_blocks(route.decode, route.demand)
        request.pending = [(decode.key, self._pending.add(decode.key, 0 if prefill else num_tokens, num_blocks))]
        if prefill is not None:
            request.pending.append((prefill.key, self._pending.add(prefill.key, num_tokens)))
        if (pull := route.chosen.pull) is None:
            self.queue.after(self._delays.dispatch_s, lambda: self._compute(request))
            return
        holder, chain = self._by_key[pull.holder.key], request.hashes[: pull.total_blocks]
        self._pulling.pull(prefill or decode, holder, chain, lambda: self._compute(request))

    def _compute(self, request: _Request) -> None:
        """What is to be pulled is there."""
        arrival, decode, prefill = request.arrival, request.decode, request.prefill
        assert decode is not None
        try:
            if prefill is None:
                decode.scheduler.add(decode.sequence(arrival.id, arrival.prompt, arrival.num_output))
            else:
                prefill.scheduler.add(prefill.sequence(arrival.id, arrival.prompt, 1, prefill_only=True))
        except QueueFullError:
            if prefill is not None:
                decode.scheduler.abort(SequenceId(arrival.id))
                decode.scheduler.pool.quarantine(request.lent)
                decode.scheduler.pool.restore(request.lent)  # nobody has begun to write
                self._touch(decode)
                decode.wake()
            while request.pending:
                self._pending.remove(*request.pending.pop())
            self._try_later(request)
            return
        for worker in filter(None, (decode, prefill)):
            self._touch(worker)
            worker.wake()

    def _try_later(self, request: _Request) -> None:
        request.served.num_retries += 1
        self.queue.after(RETRY_S, lambda: self._send(request, self._route(request)))

    def _candidate(self, worker: SimulatedWorker, hashes: Sequence[bytes]) -> Candidate:
        seen = self._seen[worker.key]
        num_prefix = next((i for i, h in enumerate(hashes) if h not in seen.hashes), len(hashes))
        if self._delays.report_every_s == 0:
            return worker.candidate(worker.load(), self._pending.of(worker.key), num_prefix)
        load = seen.load
        there = self._pending.there(worker.key, load.num_requests, load.num_queued_prefill_tokens)
        return worker.candidate(load, there, num_prefix)

    def _on_events(self, worker: SimulatedWorker, events: list[Event]) -> None:
        self._touch(worker)
        for event in events:
            request = self._requests[event.id]
            match event:
                case Started() if not request.started:
                    request.started = True
                    request.served.num_cached = event.num_cached
                case TokenDrawn() if worker is request.prefill:
                    waits = self._objectives is not None and self._objectives.promises_gaps
                    if not waits or request.arrival.num_output == 1:
                        self._tell(request, event)
                    self._ship(request, event)
                case Resumed():
                    assert request.delivered is not None
                    self._answer(request, request.delivered)
                case TokenDrawn():
                    self._answer(request, event)

    def _ship(self, request: _Request, event: TokenDrawn) -> None:
        """The prompt is computed elsewhere, and all but its last chunk was written meanwhile."""
        assert request.prefill is not None
        self._pending.computed(*request.pending[-1])
        spec = request.prefill.spec
        chunk = -(-spec.limits.max_step_tokens // self._block_size)
        transfer_s = self._costs.transfer_s(min(len(request.lent), chunk) * spec.block_nbytes)
        self.queue.after(transfer_s, lambda: self._arrive(request, event))

    def _arrive(self, request: _Request, event: TokenDrawn) -> None:
        decode, prefill = request.decode, request.prefill
        assert decode is not None
        assert prefill is not None
        prefill.wrote()
        prefill.scheduler.abort(event.id)
        self._pending.remove(*request.pending.pop())
        (delivered,) = decode.scheduler.deliver(event.id, request.lent, event.drawn)
        assert isinstance(delivered, TokenDrawn)
        self._touch(prefill)
        if delivered.finish is None:
            request.delivered = delivered
        else:
            self._on_events(decode, [delivered])
        prefill.wake()
        decode.wake()

    def _tell(self, request: _Request, event: TokenDrawn) -> None:
        """Its caller has the token."""
        if not request.answer:
            request.served.first_s = self.queue.now_s
        request.served.token_at_s.append(self.queue.now_s)
        request.answer.append(event.drawn.token_id)

    def _answer(self, request: _Request, event: TokenDrawn) -> None:
        request.num_drawn += 1
        if request.num_drawn > len(request.answer):
            self._tell(request, event)
        if request.num_drawn == 1:
            self._pending.computed(*request.pending[0])
        if event.finish is None:
            return
        request.served.ended_s = self.queue.now_s
        self._pending.remove(*request.pending.pop())
        del self._requests[request.arrival.id]
        self._served.append(request.served)
        if (again := request.arrival.then(self.queue.now_s, request.answer)) is not None:
            self._expect(again)

    def _on_changes(self, worker: SimulatedWorker, changes: list[CacheChange]) -> None:
        def see() -> None:
            hashes = self._seen[worker.key].hashes
            for change in changes:
                (hashes.add if change.stored else hashes.discard)(change.hash)

        self.queue.after(self._delays.events_s, see)

    def _touch(self, worker: SimulatedWorker) -> None:
        """Its load has changed: a report is due, if none is."""
        seen = self._seen[worker.key]
        if seen.report_due:
            return
        seen.report_due = True
        self.queue.at(
            max(self.queue.now_s, seen.reported_s + self._delays.report_every_s), lambda: self._report(worker)
        )

    def _report(self, worker: SimulatedWorker) -> None:
        seen, load = self._seen[worker.key], worker.load()
        seen.report_due, seen.reported_s = False, self.queue.now_s

        def see() -> None:
            seen.load = load
            self._pending.reported(worker.key)
            self._look_soon()

        self.queue.after(self._delays.events_s, see)
