"""Virtual time.  Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


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

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._heap:
            self.now_s, _, act = heapq.heappop(self._heap)
            act()
