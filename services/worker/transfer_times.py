"""How fast this worker writes into others' pools and how soon they answer, as measured.  Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from services.runtime.place import Distance

# What a transfer weighs when so many more have been seen.
HALF_LIFE_TRANSFERS = 50
_KEEP = 0.5 ** (1 / HALF_LIFE_TRANSFERS)


@dataclass(slots=True)
class _Times:
    bytes: float = 0.0
    busy_s: float = 0.0
    answers: float = 0.0
    answers_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.busy_s if self.busy_s > 0 else 0.0

    @property
    def round_trip_s(self) -> float:
        return self.answers_s / self.answers if self.answers else 0.0


@dataclass(slots=True)
class TransferTimes:
    """Older transfers weigh less, among all and among those at one distance."""

    _all: _Times = field(default_factory=_Times)
    _by_distance: dict[Distance, _Times] = field(default_factory=dict)

    def wrote(self, num_bytes: int, busy_s: float, distance: Distance) -> None:
        for times in self._both(distance):
            times.bytes = times.bytes * _KEEP + num_bytes
            times.busy_s = times.busy_s * _KEEP + busy_s

    def answered(self, elapsed_s: float, distance: Distance) -> None:
        """A pool's owner, to a commit: ``elapsed_s`` without what it spent on verifying."""
        for times in self._both(distance):
            times.answers = times.answers * _KEEP + 1
            times.answers_s = times.answers_s * _KEEP + max(0.0, elapsed_s)

    @property
    def bytes_per_s(self) -> float:
        """0 until something was written."""
        return self._all.bytes_per_s

    @property
    def round_trip_s(self) -> float:
        """0 until a commit was answered."""
        return self._all.round_trip_s

    def by_distance(self) -> Iterator[tuple[Distance, float, float]]:
        """Of each that was measured: bytes a second, and the round trip or 0."""
        for distance, times in self._by_distance.items():
            if times.bytes_per_s:
                yield distance, times.bytes_per_s, times.round_trip_s

    def _both(self, distance: Distance) -> tuple[_Times, _Times]:
        return self._all, self._by_distance.setdefault(distance, _Times())
