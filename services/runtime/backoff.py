"""How long to wait before trying again."""

from __future__ import annotations

import random


def jittered(seconds: float) -> float:
    """A hint when to come again, for one of many who are refused together: that long, or up to half as long again."""
    return seconds * random.uniform(1.0, 1.5)


class Backoff:
    """Doubling delays with full jitter, so that many clients of one lost service do not return in step.  Not for use by
    several tasks at once."""

    def __init__(self, initial_s: float = 0.1, cap_s: float = 2.0) -> None:
        self._initial_s = initial_s
        self._cap_s = cap_s
        self._bound_s = initial_s

    def next_s(self) -> float:
        """The next delay, in seconds: between half of the current bound and the bound, which then doubles to the cap."""
        bound_s = self._bound_s
        self._bound_s = min(2 * bound_s, self._cap_s)
        return bound_s * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It worked; the next failure starts from the initial delay."""
        self._bound_s = self._initial_s
