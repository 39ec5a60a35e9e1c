"""Units on the wire.  Pure."""

from __future__ import annotations


def to_us(seconds: float) -> int:
    """Whole microseconds; 0 of what clocks that were read one after the other made negative."""
    return max(0, round(seconds * 1e6))
