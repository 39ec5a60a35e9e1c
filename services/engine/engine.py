"""The thread that computes.  ``Engine.step`` is the whole story: plan, run, complete, tell."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from services.engine.batch import Batch, build_batch
from services.engine.blocks import CacheChange
from services.engine.gaps import Gaps
from services.engine.ready import Ready
from services.engine.sampling_params import DrawFailed, Drawn
from services.engine.scheduler import Plan, Scheduler
from services.engine.sequence import ChunkComputed, Event, SequenceId, Started, TokenDrawn

log = structlog.get_logger(__name__)

RATE_HALF_LIFE_S = 5.0
CLOSE_TIMEOUT_S = 10.0


class Runner(Protocol):
    @property
    def late_s(self) -> float:
        """Of the last run, how long it waited for the interpreter after the numbers were there; 0 where none tells."""

    @property
    def ready(self) -> Ready | None:
        """Of the last run, when the KV that it computed is in the pool; None where it is.  A run that leaves some to come
        has waited for the one before."""

    def run(self, batch: Batch) -> list[Drawn | DrawFailed | None]:
        """Computes a step and draws one token per entry of ``batch.samples``, in order; None behind a draft that is not
        what was drawn.  Blocks; one thread calls it."""


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


class Listener(Protocol):
    """Called on any thread, with the engine's lock held; must neither block nor call back."""

    def on_started(self, events: list[Event]) -> None:
        """Before the step that they start with: what their blocks hold already need not wait for it."""

    def on_events(self, events: list[Event], step: StepTime) -> None: ...

    def on_cache_changes(self, changes: list[CacheChange]) -> None: ...

    def on_death(self, error: BaseException) -> None:
        """The engine's thread has ended by a bug: nothing will be computed any more."""


class Engine:
    """Owns the thread that runs the model.  The scheduler may be used from any thread inside ``exclusive()``; it is never
    held while the model runs, so reserving or aborting does not wait for a step."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, listener: Listener, cpus: frozenset[int] = frozenset()
    ) -> None:
        """``cpus``: where its thread may run; empty leaves that to the system."""
        self.work = Work()
        self.gaps = Gaps()
        self._scheduler = scheduler
        self._runner = runner
        self._listener = listener
        self._cpus = cpus
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._ready: Ready | None = None  # of the last step, which may still run
        self._idle_since_s: float | None = None  # time.monotonic(); None while there was nothing to compute
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the step under way.  Idempotent; blocks for up to that step, at most ``CLOSE_TIMEOUT_S``:
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
                    self._tell_cache_changes()
        finally:
            if wake:
                self._wake.set()

    def step(self) -> bool:
        """Computes one step; False when there is nothing to compute."""
        with self._lock:
            plan = self._scheduler.plan()
            if plan is None:
                self._idle_since_s = None
                return False
            before = self._ready
            if plan.started:
                self._listener.on_started(_once_ready(plan.started, before))
        num_prefill, num_decode = plan.num_prefill_tokens, plan.num_decode_tokens
        started_s = time.monotonic()
        drawn, failure = self._compute(plan)
        elapsed_s = time.monotonic() - started_s
        with self._lock:
            events = self._scheduler.fail(plan, failure) if failure else self._scheduler.complete(plan, drawn)
            if self._ready is not None:
                events = _once_ready(events, self._ready)
            # The first of several that leave their work behind has waited for no other.
            took_s = elapsed_s if self._ready is None or before is not None else None
            self._account(plan, num_prefill, num_decode, _num_accepted(events), took_s)
            self._listener.on_events(events, StepTime(tuple(s.id for s in plan.sequences), started_s, elapsed_s))
            self._tell_cache_changes()
        return True

    def _tell_cache_changes(self) -> None:
        """With the lock held, so that they are told in their order."""
        if changes := self._scheduler.pool.take_changes():
            self._listener.on_cache_changes(changes)

    def _compute(self, plan: Plan) -> tuple[list[Drawn | DrawFailed | None], str]:
        try:
            batch = build_batch(plan.entries, self._scheduler.limits.block_size)
            if self._idle_since_s is not None:
                self.gaps.observe(time.monotonic() - self._idle_since_s)
            drawn = self._runner.run(batch)
            self._ready = self._runner.ready
            self._idle_since_s = time.monotonic() - self._runner.late_s
        except Exception as e:  # one batch fails, not the worker
            log.exception("step_failed", sequences=[s.id for s in plan.sequences])
            self._idle_since_s = None
            return [], f"the model could not be run: {e}"
        return drawn, ""

    def _account(self, plan: Plan, prefill: int, decode: int, accepted: int, elapsed_s: float | None) -> None:
        """``elapsed_s`` None: nobody knows yet how long it takes."""
        work = self.work
        decode += accepted
        work.drafted_tokens += plan.num_draft_tokens
        work.accepted_tokens += accepted
        work.steps += 1
        work.decode_tokens += decode
        work.prefill_tokens += prefill
        work.cached_tokens += sum(s.num_cached for s in plan.started)
        if elapsed_s is None:
            return
        work.busy_s += elapsed_s
        weight = 1 - 0.5 ** (elapsed_s / RATE_HALF_LIFE_S)
        # A mixed step says little about either phase alone.
        if prefill and not decode:
            work.prefill_tokens_per_s = _blend(work.prefill_tokens_per_s, prefill / elapsed_s, weight)
        elif decode and not prefill:
            work.decode_tokens_per_s = _blend(work.decode_tokens_per_s, decode / elapsed_s, weight)

    def _run(self) -> None:
        try:
            if self._cpus:
                os.sched_setaffinity(0, self._cpus)
            while not self._stopping:
                self._wake.clear()
                # Looked at again after the clear: close() may have set both in between.
                if not self.step() and not self._stopping:
                    self._wake.wait()
        except BaseException as e:
            log.exception("engine_died")
            self._listener.on_death(e)


def _once_ready(events: Iterable[Event], ready: Ready | None) -> list[Event]:
    """The events, of which those that tell of KV say when it is in the pool."""
    if ready is None:
        return list(events)
    return [replace(e, ready=ready) if isinstance(e, Started | ChunkComputed) else e for e in events]


def _num_accepted(events: list[Event]) -> int:
    """Tokens beside the one that a step brings each sequence."""
    drawn = [event.id for event in events if isinstance(event, TokenDrawn)]
    return len(drawn) - len(set(drawn))


def _blend(old: float, new: float, weight: float) -> float:
    return new if old == 0 else old + (new - old) * weight
