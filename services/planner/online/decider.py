"""Which worker should change its role, where one more should start and where one should go, and why.  Pure: time and
reports come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.candidates import Role, WorkerKey
from services.planner.online.attainment import Attainment
from services.planner.online.needs import Needs, NeedsBook, Sample


@dataclass(frozen=True, slots=True)
class Terms:
    """A split is left for one whose fuller side would be ``gain`` times less full, and only while the fuller side is above
    ``pressure`` of its room; both for ``patience`` looks in a row, and ``cooldown_s`` after the last change.

    With ``max_workers`` the number of workers changes too, within ``min_workers`` and that.  One starts where the best
    split of those that are there would have its fuller side above ``full``, one goes where that of one fewer would have it
    below ``spare``; the first for ``patience`` looks in a row, the other for ``spare_s``.

    Without ``change_roles`` nobody's does: the split changes as workers start and go.

    Objectives are missed where less than ``objective`` is in time.  Then the fuller side is full, whatever is reckoned,
    and nobody goes."""

    itl_s: float
    window_s: float = 10.0
    catch_up_s: float = 5.0
    gain: float = 1.25
    pressure: float = 0.6
    patience: int = 3
    cooldown_s: float = 15.0
    min_prefill: int = 1
    min_decode: int = 1
    objective: float = 0.9
    min_workers: int = 2
    max_workers: int | None = None
    full: float = 0.85
    spare: float = 0.5
    spare_s: float = 60.0
    change_roles: bool = True

    def __post_init__(self) -> None:
        least = max(self.min_workers, self.min_prefill + self.min_decode)
        if self.max_workers is not None and self.max_workers < least:
            raise ValueError(f"{self.max_workers} workers at most are fewer than the {least} that there must be")


@dataclass(frozen=True, slots=True)
class Move:
    """``worker`` should become ``role``."""

    worker: WorkerKey
    role: Role


@dataclass(frozen=True, slots=True)
class Grow:
    """One more worker of ``role``."""

    role: Role


@dataclass(frozen=True, slots=True)
class Shrink:
    """One worker of ``role`` fewer."""

    role: Role


Step = Move | Grow | Shrink


@dataclass(frozen=True, slots=True)
class Decision:
    """``num_prefill`` and ``num_decode`` are recommended; ``step`` is the first there, when it is time for one."""

    needs: Needs | None
    num_prefill: int
    num_decode: int
    step: Step | None
    reason: str


@dataclass(frozen=True, slots=True)
class _Wish:
    step: type[Move] | type[Grow]
    role: Role


class Decider:
    """One worker at a time: what a change brought is seen before the next."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._book = NeedsBook(itl_s=terms.itl_s, window_s=terms.window_s, catch_up_s=terms.catch_up_s)
        self._wish: _Wish | None = None
        self._num_wishing = 0
        self._spare_since_s: float | None = None
        self._rests_until_s = float("-inf")

    def look(self, now_s: float, samples: Sequence[Sample], attained: Attainment | None = None) -> Decision:
        """``samples`` of all workers that are there; ``attained`` where gateways were asked."""
        terms = self._terms
        num_prefill, total = sum(s.role is Role.PREFILL for s in samples), len(samples)
        num_decode = total - num_prefill
        needs = self._book.add(now_s, samples)

        def stays(reason: str) -> Decision:
            self._wish, self._num_wishing = None, 0
            return Decision(needs, num_prefill, num_decode, None, reason)

        if total < terms.min_prefill + terms.min_decode:
            return stays(
                f"{total} workers cannot be split into {terms.min_prefill} prefill and {terms.min_decode} decode"
            )
        if needs is None:
            return stays("not seen for long enough")
        what = f"prefill needs {needs.prefill:.2f} workers, decode {needs.decode:.2f}"
        if missed := "" if attained is None else attained.misses(terms.objective):
            needs = needs.with_fuller_side_full(num_prefill, num_decode)
            what += f", with {missed}"
        best = self._best(needs, total, num_prefill, total)
        fill = needs.utilization(best, total - best)

        role, why = self._to_go(now_s, needs, samples, missed=bool(missed))
        if role is not None:
            less = self._best(needs, total - 1, num_prefill, total)
            return self._at_rest(now_s, samples, needs, (less, total - 1 - less), Shrink(role), f"{what}: {why}")

        if terms.max_workers is not None and total < terms.max_workers and fill > terms.full:
            more = self._best(needs, total + 1, num_prefill, total)
            role = Role.PREFILL if more > num_prefill else Role.DECODE
            what += f": {total} workers are {fill:.0%} full at best"
            return self._in_time(now_s, samples, needs, (more, total + 1 - more), _Wish(Grow, role), what)

        if num_prefill == best or not terms.change_roles:
            return stays(
                f"{what}: {num_prefill} and {num_decode} are the best split"
                if num_prefill == best
                else f"{what}: roles stay"
            )
        if terms.min_prefill <= num_prefill <= total - terms.min_decode:
            now = needs.utilization(num_prefill, num_decode)
            if now < terms.pressure:
                return stays(f"{what}: there is room, the fuller side is {now:.0%} full")
            if now < terms.gain * fill:
                return stays(f"{what}: {best} and {total - best} would be {now:.0%} to {fill:.0%}, too little to gain")
            what += f": {best} and {total - best} take the fuller side from {now:.0%} to {fill:.0%}"
        wish = _Wish(Move, Role.PREFILL if best > num_prefill else Role.DECODE)
        return self._in_time(now_s, samples, needs, (best, total - best), wish, what)

    def made(self, now_s: float) -> None:
        """A step has been made, or has failed."""
        self._rests_until_s = now_s + self._terms.cooldown_s
        self._wish, self._num_wishing, self._spare_since_s = None, 0, None
        self._book.forget()

    def _best(self, needs: Needs, total: int, num_prefill: int, now: int) -> int:
        """How many prefill workers of ``total``; of equals those nearest to ``num_prefill`` of ``now``."""
        terms = self._terms
        within = range(terms.min_prefill, total - terms.min_decode + 1)
        if not terms.change_roles:  # nobody's role, and one worker more or less
            near = range(num_prefill - max(0, now - total), num_prefill + max(0, total - now) + 1)
            within = range(max(within.start, near.start), min(within.stop, near.stop)) or within
        return min(
            within,
            key=lambda n: (needs.utilization(n, total - n), abs(n - num_prefill)),
        )

    def _to_go(self, now_s: float, needs: Needs, samples: Sequence[Sample], *, missed: bool) -> tuple[Role | None, str]:
        """The role that has one too many, and why; None where nobody is."""
        terms, total = self._terms, len(samples)
        num_prefill = sum(s.role is Role.PREFILL for s in samples)
        least = max(terms.min_workers, terms.min_prefill + terms.min_decode)
        if terms.max_workers is None or total <= least:
            self._spare_since_s = None
            return None, ""
        less = self._best(needs, total - 1, num_prefill, total)
        fill = needs.utilization(less, total - 1 - less)
        too_many = total > terms.max_workers
        if not too_many and (missed or fill >= terms.spare):
            self._spare_since_s = None
            return None, ""
        if self._spare_since_s is None:
            self._spare_since_s = now_s
        if not too_many and now_s - self._spare_since_s < terms.spare_s:
            return None, ""
        role = Role.PREFILL if less < num_prefill else Role.DECODE
        return role, f"{total - 1} workers would be {fill:.0%} full"

    def _in_time(
        self, now_s: float, samples: Sequence[Sample], needs: Needs, to: tuple[int, int], wish: _Wish, what: str
    ) -> Decision:
        """Done once it has been wished for often enough."""
        if wish != self._wish:
            self._num_wishing = 0
        self._wish = wish
        self._num_wishing += 1
        if self._num_wishing < self._terms.patience:
            what += f"; seen {self._num_wishing} of {self._terms.patience} times"
            return Decision(needs, *to, None, what)
        step = Grow(wish.role) if wish.step is Grow else Move(self._who(samples, wish.role), wish.role)
        return self._at_rest(now_s, samples, needs, to, step, what)

    def _at_rest(
        self, now_s: float, samples: Sequence[Sample], needs: Needs, to: tuple[int, int], step: Step, what: str
    ) -> Decision:
        """Done where nothing else is being done."""
        if any(s.draining for s in samples):
            return Decision(needs, *to, None, f"{what}; a worker is draining")
        if now_s < self._rests_until_s:
            waits_s = self._rests_until_s - now_s
            return Decision(needs, *to, None, f"{what}; {waits_s:.0f} s after the last change it is too early")
        return Decision(needs, *to, step, f"{what}; {_told(step)}")

    def _who(self, samples: Sequence[Sample], to: Role) -> WorkerKey:
        """The one that has least to finish."""
        least = min(
            (s for s in samples if s.role is not to),
            key=lambda s: (s.num_running, s.num_queued_prefill_tokens, s.key.worker_id),
        )
        return least.key


def _told(step: Step) -> str:
    match step:
        case Move(worker, role):
            return f"{worker.worker_id} becomes {role.name.lower()}"
        case Grow(role):
            return f"one more {role.name.lower()} worker starts"
        case Shrink(role):
            return f"one {role.name.lower()} worker goes"
