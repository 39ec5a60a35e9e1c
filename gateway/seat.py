"""Which of a gateway's processes this is, and where they meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Seat:
    """One of ``count`` processes that share a gateway's ports.  Whoever follows a process that has ended has its
    ``number``.  ``folder`` is theirs alone, for as long as the parent lives."""

    number: int
    count: int
    folder: Path

    @property
    def socket(self) -> Path:
        """Where it answers the others."""
        return self._socket(self.number)

    @property
    def sockets_of_others(self) -> tuple[Path, ...]:
        return tuple(self._socket(number) for number in range(self.count) if number != self.number)

    @property
    def quotas(self) -> Path:
        return self.folder / "quotas"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics"

    def _socket(self, number: int) -> Path:
        return self.folder / f"{number}.sock"
