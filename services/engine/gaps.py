"""How long the processor had no step although there was one to compute."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


@dataclass(slots=True)
class Gaps:
    """A histogram, in seconds.  ``counts[i]``: gaps of at most ``BOUNDS_S[i]`` and more than the bound before; the last
    one counts those above all bounds.  One thread observes; whoever reads meanwhile may miss the newest."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds
