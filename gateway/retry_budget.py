"""How many attempts a gateway makes beyond the first ones, of all its requests together.  Pure: times come in.

A cluster that fails because it is overloaded is not helped by being asked three times as often.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Slice:
    """Of the window; what ``spend`` hands out, to be given back."""

    began_s: float
    num_requests: int = 0
    num_retries: int = 0


class RetryBudget:
    """Within any ``window_s``: ``ratio`` times as many retries as requests, and ``floor_per_s`` more, so that a gateway
    with little to do can make some as well.  They count until their slice is wholly out of the window.  A retry that got
    somewhere is given back and costs nothing.

    Parts of a whole keep its budget without talking: shares of their requests are a share of all.  Of what does not depend
    on requests each of ``num_sharers`` has its part, and at least one retry."""

    def __init__(
        self, ratio: float, *, floor_per_s: float = 3.0, window_s: float = 10.0, num_slices: int = 10,
        num_sharers: int = 1,
    ) -> None:  # fmt: skip
        self._ratio = ratio
        floor = floor_per_s * window_s
        self._floor = max(floor / num_sharers, min(1.0, floor))
        self._window_s = window_s
        self._slice_s = window_s / num_slices
        self._slices: deque[Slice] = deque()

    def request(self, now_s: float) -> None:
        """A request came."""
        self._at(now_s).num_requests += 1

    def can_spend(self, now_s: float) -> bool:
        self._at(now_s)
        num_requests = sum(s.num_requests for s in self._slices)
        num_retries = sum(s.num_retries for s in self._slices)
        return num_retries + 1 <= self._floor + self._ratio * num_requests

    def spend(self, now_s: float) -> Slice:
        """For one retry, whether or not there is room for it."""
        spent = self._at(now_s)
        spent.num_retries += 1
        return spent

    def give_back(self, spent: Slice) -> None:
        """Once for each ``spend``."""
        assert spent.num_retries > 0
        spent.num_retries -= 1

    def _at(self, now_s: float) -> Slice:
        while self._slices and self._slices[0].began_s <= now_s - self._window_s - self._slice_s:
            self._slices.popleft()
        if not self._slices or now_s >= self._slices[-1].began_s + self._slice_s:
            self._slices.append(Slice(now_s))
        return self._slices[-1]
