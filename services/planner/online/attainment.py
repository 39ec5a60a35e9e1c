"""Which share of first tokens and of gaps between tokens came in time lately, from what gateways count.  Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Buckets = tuple[tuple[float, float], ...]  # ascending: seconds, and how many were within them since a gateway's start


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one gateway."""

    ttft: Buckets
    itl: Buckets


@dataclass(frozen=True, slots=True)
class Attainment:
    """Shares in [0, 1]; None where too little was counted to say."""

    ttft: float | None = None
    itl: float | None = None

    def misses(self, objective: float) -> str:
        """What is below ``objective``, in words; empty where nothing is known to be."""
        found = (("TTFT", self.ttft), ("ITL", self.itl))
        return " and ".join(
            f"{share:.0%} of {name}s in time" for name, share in found if share is not None and share < objective
        )


class AttainmentBook:
    """Readings of the last ``window_s`` seconds, of however many gateways.

    A gateway counts in buckets; inside the one that holds an objective its observations are taken to be spread evenly.
    One that was not there before, or counts less than it did and so has been started again, counts from nothing."""

    def __init__(self, *, ttft_s: float, itl_s: float, window_s: float, least: int = 5) -> None:
        """``least``: observations below which nothing is said."""
        self._ttft_s, self._itl_s, self._window_s, self._least = ttft_s, itl_s, window_s, least
        self._looks: deque[tuple[float, dict[str, Reading]]] = deque()

    def add(self, now_s: float, readings: Mapping[str, Reading]) -> Attainment:
        """``readings`` by gateway.  One that could not be read is left out, and counts no further meanwhile."""
        known = {**self._looks[-1][1], **readings} if self._looks else dict(readings)
        self._looks.append((now_s, known))
        while len(self._looks) > 2 and self._looks[1][0] <= now_s - self._window_s:
            self._looks.popleft()
        then = self._looks[0][1]
        pairs = [(then.get(name), reading) for name, reading in known.items()]
        return Attainment(
            self._share(((None if old is None else old.ttft, new.ttft) for old, new in pairs), self._ttft_s),
            self._share(((None if old is None else old.itl, new.itl) for old, new in pairs), self._itl_s),
        )

    def forget(self) -> None:
        """What was seen does not speak of the cluster as it is now.  What was counted stays counted."""
        while len(self._looks) > 1:
            self._looks.popleft()

    def _share(self, pairs: Iterable[tuple[Buckets | None, Buckets]], bound_s: float) -> float | None:
        inside = total = 0.0
        for old, new in pairs:
            before = (0.0, 0.0) if old is None or _total(old) > _total(new) else (_within(old, bound_s), _total(old))
            inside += _within(new, bound_s) - before[0]
            total += _total(new) - before[1]
        return inside / total if total >= self._least else None


def _total(buckets: Buckets) -> float:
    return buckets[-1][1] if buckets else 0.0


def _within(buckets: Buckets, bound_s: float) -> float:
    below_s, below = 0.0, 0.0
    for upper_s, count in buckets:
        if bound_s < upper_s:
            if upper_s == float("inf"):
                return below
            return below + (count - below) * (bound_s - below_s) / (upper_s - below_s)
        below_s, below = upper_s, count
    return below
