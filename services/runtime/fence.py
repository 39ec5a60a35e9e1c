"""Whether a process has slept through its lease: then others have given it up, and it must not go on as if they had not.
Pure: times come in, seconds of one monotonic clock.

A lease that ends while its holder is awake proves nothing about the holder: the directory is away, or out of reach.  What a
holder has promised to others ends by its own clock, on which it looks as long as it runs.  Only what ran out while nobody
looked is done late.
"""

from __future__ import annotations


class Fence:
    def __init__(self, now_s: float) -> None:
        self._awake_s = now_s
        self._ttl_s: float | None = None
        self._ends_s = 0.0

    def granted(self, asked_s: float, ttl_s: float) -> None:
        """The lease was given, or renewed, when it was asked for at ``asked_s``: whoever gave it counts from later."""
        self._ttl_s, self._ends_s = ttl_s, asked_s + ttl_s

    def awake(self, now_s: float) -> float | None:
        """To be called several times within a third of a lease.  For how many seconds nobody did, when that was for longer
        than such a third and the lease ended meanwhile, or for as long as a lease; otherwise None."""
        since_s, self._awake_s = self._awake_s, now_s
        slept_s = now_s - since_s
        if self._ttl_s is None or slept_s <= self._ttl_s / 3:
            return None
        return slept_s if since_s <= self._ends_s <= now_s or slept_s >= self._ttl_s else None
