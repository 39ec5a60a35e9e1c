"""How fast this worker writes into others' pools and how soon they answer, as measured.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

# What a transfer weighs when so many more have been seen.
HALF_LIFE_TRANSFERS = 50
_KEEP = 0.5 ** (1 / HALF_LIFE_TRANSFERS)


@dataclass(slots=True)
class TransferTimes:
    """Older transfers weigh less."""

    _bytes: float = 0.0
    _busy_s: float = 0.0
    _answers: float = 0.0
    _answers_s: float = 0.0

    def wrote(self, num_bytes: int, busy_s: float) -> None:
        self._bytes = self._bytes * _KEEP + num_bytes
        self._busy_s = self._busy_s * _KEEP + busy_s

    def answered(self, elapsed_s: float) -> None:
        """A pool's owner, to a commit: ``elapsed_s`` without what it spent on verifying."""
        self._answers = self._answers * _KEEP + 1
        self._answers_s = self._answers_s * _KEEP + max(0.0, elapsed_s)

    @property
    def bytes_per_s(self) -> float:
        """0 until something was written."""
        return self._bytes / self._busy_s if self._busy_s > 0 else 0.0

    @property
    def round_trip_s(self) -> float:
        """0 until a commit was answered."""
        return self._answers_s / self._answers if self._answers else 0.0
