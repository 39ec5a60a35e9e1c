"""The bench's arithmetic: works timed in turn, and the medians of their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PAUSE_S = 0.02  # torch's threads spin for a while after they are done, on the next one's processor


@dataclass(frozen=True, slots=True)
class Row:
    """``ratio`` is above 1 where ours is better; a limit's is the share of it that is reached."""

    work: str
    ours: float
    peer: float
    ratio: float
    goal: float | None
    unit: str = "ms"

    @property
    def is_met(self) -> bool:
        return self.goal is None or self.ratio >= self.goal


def in_turn(calls: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, every round taking all of them one after the other."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(PAUSE_S)
            taken[name].append(call())
    return taken


def compared(work: str, ours: list[float], peer: list[float], goal: float | None = None) -> Row:
    """The median of the rounds' own ratios, which a machine that changes its speed does not move."""
    ratio = statistics.median(theirs / own for own, theirs in zip(ours, peer, strict=True))
    return Row(work, statistics.median(ours) * 1e3, statistics.median(peer) * 1e3, round(ratio, 3), goal)
