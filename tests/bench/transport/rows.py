"""The bench's arithmetic: what was measured, as ratios that say how many times as good as the peer we are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """``ours`` and ``peer`` are medians in ``unit``.  ``ratio`` is above 1 where we are better, whatever the unit, and
    good from ``goal`` on."""

    work: str
    ours: float
    peer: float
    ratio: float
    goal: float
    unit: str

    @property
    def is_met(self) -> bool:
        return self.ratio >= self.goal


def more_is_better(work: str, ours: Sequence[float], peer: Sequence[float], goal: float, unit: str) -> Row:
    """The ratio is the median of the rounds' own ratios, which a machine that changes its speed does not move."""
    ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    return Row(work, statistics.median(ours), statistics.median(peer), ratio, goal, unit)


def less_is_better(work: str, ours: Sequence[float], peer: Sequence[float], goal: float, unit: str) -> Row:
    ratio = statistics.median(b / a for a, b in zip(ours, peer, strict=True))
    return Row(work, statistics.median(ours), statistics.median(peer), ratio, goal, f"{unit}, less is better")


def within(work: str, ours: Sequence[float], limit: float, unit: str) -> Row:
    """Against a fixed limit, such as a number of seconds: a ratio of 1 or more keeps it."""
    return less_is_better(work, ours, [limit] * len(ours), 1.0, unit)
