"""Virtual time.  Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from math import inf


class EventQueue:
    """What is to happen, by when; at one instant in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, time_s: float, act: Callable[[], None]) -> None:
        assert time_s >= self.now_s, "nothing happens in the past"
        heapq.heappush(self._heap, (time_s, next(self._numbers), act))

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, act)

    def run(self, until_s: float = inf) -> None:
        """Until nothing is left to happen, or until then."""
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, act = heapq.heappop(self._heap)
            act()
        if until_s < inf:
            self.now_s = max(self.now_s, until_s)
