"""Which worker should change its role, and why.  Pure: time and reports come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.candidates import Role, WorkerKey
from services.planner.online.needs import Needs, NeedsBook, Sample


@dataclass(frozen=True, slots=True)
class Terms:
    """A split is left for one whose fuller side would be ``gain`` times less full, and only while the fuller side is above
    ``pressure`` of its room; both for ``patience`` looks in a row, and ``cooldown_s`` after the last change."""

    itl_s: float
    window_s: float = 10.0
    catch_up_s: float = 5.0
    gain: float = 1.25
    pressure: float = 0.6
    patience: int = 3
    cooldown_s: float = 15.0
    min_prefill: int = 1
    min_decode: int = 1


@dataclass(frozen=True, slots=True)
class Move:
    """``worker`` should become ``role``."""

    worker: WorkerKey
    role: Role


@dataclass(frozen=True, slots=True)
class Decision:
    """``num_prefill`` and ``num_decode`` are recommended, of as many workers as there are; ``move`` is the first step
    there, when it is time for one."""

    needs: Needs | None
    num_prefill: int
    num_decode: int
    move: Move | None
    reason: str


class Decider:
    """One worker at a time: what a change brought is seen before the next."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._book = NeedsBook(itl_s=terms.itl_s, window_s=terms.window_s, catch_up_s=terms.catch_up_s)
        self._num_wanting = 0
        self._wanted_role: Role | None = None
        self._rests_until_s = float("-inf")

    def look(self, now_s: float, samples: Sequence[Sample]) -> Decision:
        """``samples`` of all workers that are there."""
        terms = self._terms
        num_prefill = sum(s.role is Role.PREFILL for s in samples)
        total = len(samples)
        needs = self._book.add(now_s, samples)

        def stays(reason: str) -> Decision:
            self._num_wanting = 0
            return Decision(needs, num_prefill, total - num_prefill, None, reason)

        if total < terms.min_prefill + terms.min_decode:
            return stays(
                f"{total} workers cannot be split into {terms.min_prefill} prefill and {terms.min_decode} decode"
            )
        if needs is None:
            return stays("not seen for long enough")
        best = min(
            range(terms.min_prefill, total - terms.min_decode + 1),
            key=lambda n: (needs.utilization(n, total - n), abs(n - num_prefill)),
        )
        what = f"prefill needs {needs.prefill:.2f} workers, decode {needs.decode:.2f}"
        if num_prefill == best:
            return stays(f"{what}: {num_prefill} and {total - num_prefill} are the best split")
        if terms.min_prefill <= num_prefill <= total - terms.min_decode:
            now, then = needs.utilization(num_prefill, total - num_prefill), needs.utilization(best, total - best)
            if now < terms.pressure:
                return stays(f"{what}: there is room, the fuller side is {now:.0%} full")
            if now < terms.gain * then:
                return stays(f"{what}: {best} and {total - best} would be {now:.0%} to {then:.0%}, too little to gain")
            what += f": {best} and {total - best} take the fuller side from {now:.0%} to {then:.0%}"
        to = Role.PREFILL if best > num_prefill else Role.DECODE
        if to is not self._wanted_role:
            self._num_wanting = 0
        self._wanted_role = to
        self._num_wanting += 1
        move = None
        if any(s.draining for s in samples):
            what += "; a worker is draining"
        elif self._num_wanting < terms.patience:
            what += f"; seen {self._num_wanting} of {terms.patience} times"
        elif now_s < self._rests_until_s:
            what += f"; {self._rests_until_s - now_s:.0f} s after the last change it is too early"
        else:
            move = Move(self._who(samples, to), to)
            what += f"; {move.worker.worker_id} becomes {to.name.lower()}"
        return Decision(needs, best, total - best, move, what)

    def moved(self, now_s: float) -> None:
        """A move has been made, or has failed."""
        self._rests_until_s = now_s + self._terms.cooldown_s
        self._num_wanting = 0
        self._book.forget()

    def _who(self, samples: Sequence[Sample], to: Role) -> WorkerKey:
        """The one that has least to finish."""
        least = min(
            (s for s in samples if s.role is not to),
            key=lambda s: (s.num_running, s.num_queued_prefill_tokens, s.key.worker_id),
        )
        return least.key
