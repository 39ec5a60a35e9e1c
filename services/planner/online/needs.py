"""How many workers' worth of each phase a cluster has to do, from what its workers report.  Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway.candidates import Role, WorkerKey


@dataclass(frozen=True, slots=True)
class Sample:
    """A worker's report.  ``prefill_s``, ``decode_s``, ``lifetime_s`` since its start; rates and times of a decode step as
    in ``gateway.candidates.Rates``, 0 until measured."""

    key: WorkerKey
    role: Role
    draining: bool
    prefill_s: float
    decode_s: float
    lifetime_s: float
    num_running: int
    num_queued_prefill_tokens: int
    prefill_tokens_per_s: float
    step_base_s: float
    step_per_sequence_s: float
    kv_share: float  # of the pool's blocks, those that running sequences hold


@dataclass(frozen=True, slots=True)
class Needs:
    """In workers that do nothing else and are always busy."""

    prefill: float
    decode: float

    def utilization(self, num_prefill: int, num_decode: int) -> float:
        """Of the phase that has less room."""
        return max(self.prefill / num_prefill, self.decode / num_decode)

    def with_fuller_side_full(self, num_prefill: int, num_decode: int) -> Needs:
        """As needs are reckoned, they say of what there is too little, and objectives that are missed say that there is."""
        if num_prefill < 1 or num_decode < 1:
            return self
        if self.prefill / num_prefill > self.decode / num_decode:
            return replace(self, prefill=max(self.prefill, num_prefill))
        return replace(self, decode=max(self.decode, num_decode))


class NeedsBook:
    """Reports of the last ``window_s`` seconds.

    Prefill: the share of its time that each worker spent on it, and what waits, as if it were to be done within
    ``catch_up_s``.  Decode: a worker decodes as many sequences as a step of ``itl_s`` takes, by the line through its
    measured steps; so the sequences that ran by that number, and no less than the share of the pools that they fill.  Where
    no steps of two sizes were measured, the share of time."""

    def __init__(self, *, itl_s: float, window_s: float, catch_up_s: float) -> None:
        self._itl_s, self._window_s, self._catch_up_s = itl_s, window_s, catch_up_s
        self._looks: deque[tuple[float, tuple[Sample, ...]]] = deque()

    def add(self, now_s: float, samples: Sequence[Sample]) -> Needs | None:
        """None until the reports span half of the window."""
        self._looks.append((now_s, tuple(samples)))
        while len(self._looks) > 2 and self._looks[1][0] <= now_s - self._window_s:
            self._looks.popleft()
        if now_s - self._looks[0][0] < self._window_s / 2:
            return None
        return Needs(self._prefill(samples), self._decode(samples))

    def forget(self) -> None:
        """What was seen does not speak of the cluster as it is now."""
        self._looks.clear()

    def _prefill(self, samples: Sequence[Sample]) -> float:
        rate = max((s.prefill_tokens_per_s for s in samples), default=0.0)
        waiting = sum(s.num_queued_prefill_tokens for s in samples) / rate if rate > 0 else 0.0
        return self._busy(samples, prefill=True) + waiting / self._catch_up_s

    def _decode(self, samples: Sequence[Sample]) -> float:
        lines = [(s.step_base_s, s.step_per_sequence_s) for s in samples if s.step_per_sequence_s > 0]
        if not lines:
            return self._busy(samples, prefill=False)
        base_s = sum(base for base, _ in lines) / len(lines)
        per_sequence_s = sum(each for _, each in lines) / len(lines)
        most = max(1.0, (self._itl_s - base_s) / per_sequence_s)
        running = sum(s.num_running for _, seen in self._looks for s in seen if s.role is Role.DECODE) / len(
            self._looks
        )
        return max(running / most, sum(s.kv_share for s in samples if s.role is Role.DECODE))

    def _busy(self, samples: Sequence[Sample], *, prefill: bool) -> float:
        before = {s.key: s for s in self._looks[0][1]}
        total = 0.0
        for now in samples:
            then = before.get(now.key)
            if then is None or (elapsed_s := now.lifetime_s - then.lifetime_s) <= 0:
                continue
            spent_s = now.prefill_s - then.prefill_s if prefill else now.decode_s - then.decode_s
            total += spent_s / elapsed_s
        return total
