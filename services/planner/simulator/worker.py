"""A worker: the real scheduler and pool, and a model whose steps take what the cost model says.  Pure."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

from gateway.candidates import Candidate, Rates, Role, WorkerKey
from gateway.pending import Pending
from services.engine.blocks import BlockPool, CacheChange
from services.engine.hashing import chain_root
from services.engine.sampling_params import Drawn, Sampling
from services.engine.scheduler import Limits, Plan, Scheduler
from services.engine.sequence import Event, Sequence, SequenceId
from services.engine.step_times import StepTimes
from services.planner.simulator.cost_model import CostModel
from services.planner.simulator.events import EventQueue
from services.worker.pins import MAX_PINS, PinBook
from services.worker.pulls import MAX_PULLS, PullBook

ROOT = chain_root("simulated")
VOCABULARY = 2**16
# As of services.engine.engine, which has a clock.
_RATE_HALF_LIFE_S = 5.0


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """``role``, which it has at first: DECODE also computes prompts itself, where there is nobody else or routing says
    so.  Workers of one ``host`` read each other's cached blocks, as far as ``limits`` let them be pinned; those without
    one do not."""

    worker_id: str
    role: Role
    num_blocks: int
    block_nbytes: int
    limits: Limits
    host: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """As a worker reports it."""

    num_requests: int
    num_queued_prefill_tokens: int
    num_free_blocks: int
    num_expected_answer_tokens: int
    num_pinnable_blocks: int
    rates: Rates


class SimulatedWorker:
    """``on_events``: after each step, and for what started with one; ``on_cache_changes``: whenever there are any."""

    def __init__(
        self, spec: WorkerSpec, costs: CostModel, queue: EventQueue,
        on_events: Callable[[SimulatedWorker, list[Event]], None],
        on_cache_changes: Callable[[SimulatedWorker, list[CacheChange]], None],
    ) -> None:  # fmt: skip
        self.spec = spec
        self.key = WorkerKey(spec.worker_id, 1)
        self.draining = False
        self.scheduler = Scheduler(BlockPool(spec.num_blocks), spec.limits)
        self.pins = PinBook(self.scheduler.pool, max_blocks=spec.limits.max_pinned, max_pins=MAX_PINS)
        self.pulls = PullBook(self.scheduler.pool, max_pulls=MAX_PULLS)
        self._costs = costs
        self._random = random.Random(spec.worker_id)  # the same every time
        self._queue = queue
        self._on_events = on_events
        self._on_cache_changes = on_cache_changes
        self._step_times = StepTimes()
        self._prefill_rate = 0.0
        self._has_written = self._has_pulled = False
        self._busy = False
        self.role = spec.role
        self.prefill_s = self.decode_s = 0.0  # that it computed either

    def sequence(self, id_: str, prompt: tuple[int, ...], num_output: int, *, prefill_only: bool = False) -> Sequence:
        return Sequence(
            SequenceId(id_), list(prompt), Sampling(), 1 if prefill_only else num_output, frozenset(), [ROOT],
            prefill_only=prefill_only,
        )  # fmt: skip

    def wrote(self) -> None:
        """From now on it knows what transfers take."""
        self._has_written = True

    def pulled(self) -> None:
        """From now on it knows what pulls take."""
        self._has_pulled = True

    def wake(self) -> None:
        """The scheduler was given something: the next step begins now unless one is under way."""
        self._tell_changes()
        if self._busy:
            return
        plan = self.scheduler.plan()
        self._tell_changes()
        if plan is None:
            return
        self._busy = True
        elapsed_s = self._costs.scattered_s(self._costs.plan_s(plan), self._random)
        self._queue.after(elapsed_s, lambda: self._end(plan, elapsed_s))
        events: list[Event] = [*plan.started, *plan.resumed]
        if events:
            self._on_events(self, events)

    def load(self) -> Load:
        base_s, per_sequence_s = self._step_times.line()
        counts = self.scheduler.pool.counts()
        return Load(
            num_requests=self.scheduler.num_running + self.scheduler.num_waiting,
            num_queued_prefill_tokens=self.scheduler.num_queued_prefill_tokens,
            num_free_blocks=max(0, counts.free + counts.cached - self.scheduler.num_growth_blocks),
            num_expected_answer_tokens=self.scheduler.num_expected_answer_tokens,
            num_pinnable_blocks=self.pins.num_pinnable,
            rates=Rates(
                prefill_tokens_per_s=self._prefill_rate,
                step_base_s=base_s,
                step_per_sequence_s=per_sequence_s,
                transfer_bytes_per_s=self._costs.transfer_bytes_per_s if self._has_written else 0.0,
                transfer_round_trip_s=self._costs.round_trip_s if self._has_written else 0.0,
                pull_bytes_per_s=self._costs.transfer_bytes_per_s if self._has_pulled else 0.0,
                pull_overhead_s=self._costs.transfer_s(0) if self._has_pulled else 0.0,
            ),
        )

    def candidate(self, load: Load, there: Pending, num_prefix_blocks: int) -> Candidate:
        """As the gateway sees it: what it reported, and what is there by the gateway's book (gateway/worker_state.py)."""
        return Candidate(
            key=self.key, role=self.role, draining=self.draining, address=self.spec.worker_id,
            content_fingerprint="simulated", fingerprint="simulated", host=self.spec.host,
            block_size=self.spec.limits.block_size, block_nbytes=self.spec.block_nbytes,
            num_requests=there.num_requests, num_queued_prefill_tokens=there.prefill_tokens,
            num_free_blocks=max(0, load.num_free_blocks - there.num_blocks),
            num_expected_answer_tokens=load.num_expected_answer_tokens,
            num_pinnable_blocks=load.num_pinnable_blocks,
            num_prefix_blocks=num_prefix_blocks, rates=load.rates,
        )  # fmt: skip

    def _end(self, plan: Plan, elapsed_s: float) -> None:
        drawn = [
            Drawn((crc32(s.id.encode()) + len(s.tokens)) % VOCABULARY)
            for s, e in zip(plan.sequences, plan.entries, strict=True) for _ in range(e.num_samples)
        ]  # fmt: skip
        events = self.scheduler.complete(plan, drawn)
        self._busy = False
        prefill, decode = plan.num_prefill_tokens, plan.num_decode_tokens
        costs = self._costs
        asked_s = prefill * costs.prefill_token_s, decode * costs.decode_sequence_s
        if any(asked_s):
            self.prefill_s += elapsed_s * asked_s[0] / sum(asked_s)
            self.decode_s += elapsed_s * asked_s[1] / sum(asked_s)
        if prefill and not decode:
            weight = 1 - 0.5 ** (elapsed_s / _RATE_HALF_LIFE_S) if self._prefill_rate else 1.0
            self._prefill_rate += (prefill / elapsed_s - self._prefill_rate) * weight
        elif decode and not prefill:
            self._step_times.observe(decode, elapsed_s)
        self._on_events(self, events)
        self.wake()

    def _tell_changes(self) -> None:
        if changes := self.scheduler.take_cache_changes():
            self._on_cache_changes(self, changes)
