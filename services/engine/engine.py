"""The thread that has steps computed.  ``Engine.step`` is the whole story: plan, hand over, complete, tell."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from services.engine.batch import build_batch
from services.engine.blocks import CacheChange
from services.engine.copies import CopyThread
from services.engine.gaps import Gaps
from services.engine.host_tier import Copy, Direction, HostTotals
from services.engine.phase_book import PhaseBook
from services.engine.phases import Piece
from services.engine.ready import Ready
from services.engine.scheduler import Plan, Scheduler
from services.engine.sequence import ChunkComputed, Event, SequenceId, Started, TokenDrawn
from services.engine.step_sums import StepSums
from services.engine.step_times import StepTimes
from services.engine.steps import Outcome, Runner, Step

log = structlog.get_logger(__name__)

RATE_HALF_LIFE_S = 5.0
CLOSE_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Work:
    """What was computed so far.  Tokens, and seconds of model time.  ``drafted_tokens`` were guessed and verified; the
    ``accepted_tokens`` among them count as ``decode_tokens`` too."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long one step ran, and for whom: attached to the events it produced."""

    sequence_ids: tuple[SequenceId, ...]
    started_s: float  # time.monotonic()
    elapsed_s: float

    @staticmethod
    def of(plan: Plan, outcome: Outcome) -> StepTime:
        return StepTime(tuple(s.id for s in plan.sequences), outcome.began_s, outcome.ended_s - outcome.began_s)

    @staticmethod
    def none(plan: Plan) -> StepTime:
        """Of a step that failed."""
        return StepTime(tuple(s.id for s in plan.sequences), time.monotonic(), 0.0)


class Listener(Protocol):
    """Called on any thread, with the engine's lock held; must neither block nor call back."""

    def on_started(self, events: list[Event]) -> None:
        """``Started`` before the step that they start with: what their blocks hold already need not wait for it.
        ``Resumed`` as it begins."""

    def on_events(self, events: list[Event], step: StepTime) -> None: ...

    def on_cache_changes(self, changes: list[CacheChange]) -> None: ...

    def on_copied(self) -> None:
        """A copy from the host has ended, and with it perhaps a sequence that was aborted meanwhile."""

    def on_death(self, error: BaseException) -> None:
        """The engine's thread has ended by a bug: nothing will be computed any more."""


@dataclass(slots=True)
class _Flight:
    """A step between its plan and its end; without ``step`` it could not even be handed over."""

    plan: Plan
    step: Step | None = None
    failure: str = ""
    gap_s: float = 0.0  # since the step before, where there was something to compute


class Engine:
    """Owns the thread that has steps computed.  The scheduler may be used from any thread inside ``exclusive()``; it is
    never held while the model runs, so reserving or aborting does not wait for a step."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, listener: Listener, cpus: frozenset[int] = frozenset(),
        copies: CopyThread | None = None, phases: PhaseBook | None = None,
    ) -> None:  # fmt: skip
        """``cpus``: where its thread may run, if it is the one that computes; empty leaves that to the system.  ``copies``:
        makes those of the scheduler's host tier, which has no room where this is None; whoever made it closes it.
        ``phases``: by time.monotonic(), and part of the exclusive section from now on."""
        self.phases = PhaseBook(began_s=time.monotonic()) if phases is None else phases
        self.work = Work()
        self.gaps = Gaps()
        self.step_times = StepTimes()
        self._prompt_times = StepTimes()  # of steps that only compute prompts, against their tokens
        self.step_sums = StepSums()
        self._scheduler = scheduler
        self._runner = runner
        self._listener = listener
        self._copies = copies
        self._cpus = frozenset() if runner.runs_ahead else cpus
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._ahead: _Flight | None = None  # handed over while the step before it ran
        self._ready: Ready | None = None  # of the last step that was completed, which may still run
        self._idle_since_s: float | None = None  # time.monotonic(); None while there was nothing to compute
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def host_totals(self) -> HostTotals:
        return self._scheduler.host.totals

    @property
    def host_load_bytes_per_s(self) -> float:
        """0 until something came back from the host."""
        return self._copies.loaded_bytes_per_s if self._copies else 0.0

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the steps under way.  Idempotent; blocks for up to these, at most ``CLOSE_TIMEOUT_S``:
        the thread is a daemon, so the process can end without it."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    @contextmanager
    def exclusive(self, *, wake: bool = True) -> Iterator[Scheduler]:
        """The scheduler, between steps' bookkeeping.  ``wake`` has the engine look at it again afterwards."""
        try:
            with self._lock:
                try:
                    yield self._scheduler
                finally:
                    self._settle()
        finally:
            if wake:
                self._wake.set()

    def step(self) -> bool:
        """Completes one step, and shortly before its end hands over the next where the runner takes it; False when there is
        nothing to compute."""
        flight, self._ahead = self._ahead or self._launch(), None
        if flight is None:
            self._idle_since_s = None
            with self._lock:
                self.phases.rest(time.monotonic())
            return False
        if flight.plan.resumed:  # not when it was handed over: the step before it may have been under way for long
            with self._lock:
                self._listener.on_started(list(flight.plan.resumed))
        if flight.step is not None and self._runner.runs_ahead:
            flight.step.wait_nearly()
            self._ahead = self._launch()
        before, outcome = self._ready, self._land(flight)
        with self._lock:
            if outcome is None:
                events, time_ = self._scheduler.fail(flight.plan, flight.failure), StepTime.none(flight.plan)
            else:
                events, time_ = self._scheduler.complete(flight.plan, outcome.draws), StepTime.of(flight.plan, outcome)
                events, self._ready = _once_ready(events, outcome.ready), outcome.ready
                pieces = _pieces(flight.plan)
                self.phases.step(*pieces, outcome.began_s, outcome.ended_s)
            # The first of several that leave their work behind has waited for no other.
            known = outcome is not None and (outcome.ready is None or before is not None)
            expected_s = self._expected_s(flight.plan)
            if known and time_.elapsed_s and not flight.plan.num_draft_tokens:
                self.step_sums.observe(*pieces, flight.gap_s + time_.elapsed_s, expected_s)
            self._account(flight.plan, _num_accepted(events), time_.elapsed_s if known else None, expected_s)
            self._listener.on_events(events, time_)
            self._settle()
        return True

    def _launch(self) -> _Flight | None:
        """Plans a step and hands it over; None when there is nothing to compute, or not yet."""
        with self._lock:
            plan = self._scheduler.plan()
            self._settle()
            if plan is None:
                return None
            self.phases.compute(time.monotonic())
            if plan.started:
                self._listener.on_started(_once_ready(plan.started, self._ready))
        try:
            return _Flight(plan, self._runner.start(build_batch(plan.entries, self._scheduler.limits.block_size)))
        except Exception as e:
            return self._failed(_Flight(plan), e)

    def _land(self, flight: _Flight) -> Outcome | None:
        """None: it failed."""
        if flight.step is None:
            return None
        try:
            outcome = flight.step.result()
        except Exception as e:
            self._failed(flight, e)
            return None
        if self._idle_since_s is not None:
            flight.gap_s = max(0.0, outcome.began_s - self._idle_since_s)
            self.gaps.observe(flight.gap_s)
        self._idle_since_s = outcome.ended_s
        return outcome

    def _failed(self, flight: _Flight, error: Exception) -> _Flight:
        """One batch fails, not the worker."""
        log.error("step_failed", sequences=[s.id for s in flight.plan.sequences], exc_info=error)
        self._idle_since_s = None
        flight.failure = f"the model could not be run: {error}"
        return flight

    def _settle(self) -> None:
        """After the scheduler was changed, with the lock held: so changes are told in their order."""
        if changes := self._scheduler.take_cache_changes():
            self._listener.on_cache_changes(changes)
        for copy in self._scheduler.host.take_copies():
            assert self._copies is not None, "a host tier with room has somebody who copies"
            self._copies.start(copy, self._copied)

    def _copied(self, copy: Copy, ok: bool) -> None:
        """On the thread that copies."""
        try:
            with self.exclusive(wake=copy.direction is Direction.UP) as scheduler:
                scheduler.copied(copy, ok=ok)
                if copy.direction is Direction.UP:
                    self._listener.on_copied()
        except BaseException as e:  # a bug: whoever waits for copies would wait for ever
            log.exception("engine_died")
            self._listener.on_death(e)

    def _expected_s(self, plan: Plan) -> float | None:
        """By the steps before; None where there were too few of the kind."""
        expected_s = 0.0
        for times, count in ((self._prompt_times, plan.num_prefill_tokens), (self.step_times, plan.num_decode_tokens)):
            if count:
                part_s = times.expected_s(count)
                if not part_s:
                    return None
                expected_s += part_s
        return expected_s

    def _account(self, plan: Plan, accepted: int, elapsed_s: float | None, expected_s: float | None) -> None:
        """``elapsed_s`` None: nobody knows how long it takes; ``expected_s``: see ``_expected_s``."""
        work = self.work
        prefill, decode = plan.num_prefill_tokens, plan.num_decode_tokens + accepted
        work.drafted_tokens += plan.num_draft_tokens
        work.accepted_tokens += accepted
        work.steps += 1
        work.decode_tokens += decode
        work.prefill_tokens += prefill
        work.cached_tokens += sum(event.num_cached for event in plan.started)
        if not elapsed_s:
            return
        work.busy_s += elapsed_s
        weight = 1 - 0.5 ** (elapsed_s / RATE_HALF_LIFE_S)
        # A mixed step says little about either phase alone.
        if prefill and not decode:
            work.prefill_tokens_per_s = _blend(work.prefill_tokens_per_s, prefill / elapsed_s, weight)
            self._prompt_times.observe(prefill, elapsed_s)
        elif decode and not prefill:
            work.decode_tokens_per_s = _blend(work.decode_tokens_per_s, decode / elapsed_s, weight)
            if expected_s and not plan.num_draft_tokens:
                self.step_sums.observe_decode(elapsed_s, expected_s)
            self.step_times.observe(plan.num_decode_tokens, elapsed_s)

    def _run(self) -> None:
        try:
            if self._cpus:
                os.sched_setaffinity(0, self._cpus)
            while not self._stopping:
                self._wake.clear()
                # Looked at again after the clear: close() may have set both in between.
                if not self.step() and not self._stopping:
                    self._wake.wait()
            if self._ahead is not None:  # it writes into the pool
                self._land(self._ahead)
        except BaseException as e:
            log.exception("engine_died")
            self._listener.on_death(e)


def _once_ready(events: Iterable[Event], ready: Ready | None) -> list[Event]:
    """The events, of which those that tell of KV say when it is in the pool."""
    if ready is None:
        return list(events)
    return [replace(e, ready=ready) if isinstance(e, Started | ChunkComputed) else e for e in events]


def _pieces(plan: Plan) -> tuple[list[Piece], list[Piece]]:
    """Of prefill and of decode; drafts are computed too, right or wrong."""
    pieces: tuple[list[Piece], list[Piece]] = [], []
    for entry, decodes in zip(plan.entries, plan.decodes, strict=True):
        num_new = len(entry.token_ids)
        pieces[decodes].append(Piece(num_new, entry.start + num_new, entry.num_samples))
    return pieces


def _num_accepted(events: list[Event]) -> int:
    """Tokens beside the one that a step brings each sequence."""
    drawn = [event.id for event in events if isinstance(event, TokenDrawn)]
    return len(drawn) - len(set(drawn))


def _blend(old: float, new: float, weight: float) -> float:
    return new if old == 0 else old + (new - old) * weight
