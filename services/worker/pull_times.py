"""What pulls take, as measured.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

# What a pull weighs when so many more have been seen.
HALF_LIFE_PULLS = 20
_KEEP = 0.5 ** (1 / HALF_LIFE_PULLS)


@dataclass(slots=True)
class PullTimes:
    """Of pulls that succeeded.  Older ones weigh less."""

    _pulls: float = 0.0
    _bytes: float = 0.0
    _busy_s: float = 0.0
    _overhead_s: float = 0.0

    def pulled(self, num_bytes: int, busy_s: float, overhead_s: float) -> None:
        """``busy_s`` while bytes moved, ``overhead_s`` all the rest but the opening of a pool, which is done once."""
        self._pulls = self._pulls * _KEEP + 1
        self._bytes = self._bytes * _KEEP + num_bytes
        self._busy_s = self._busy_s * _KEEP + busy_s
        self._overhead_s = self._overhead_s * _KEEP + max(0.0, overhead_s)

    @property
    def bytes_per_s(self) -> float:
        """0 until something was pulled."""
        return self._bytes / self._busy_s if self._busy_s > 0 else 0.0

    @property
    def overhead_s(self) -> float:
        """0 until something was pulled."""
        return self._overhead_s / self._pulls if self._pulls else 0.0
