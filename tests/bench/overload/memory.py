"""The memory of other processes over time."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping

from services.runtime.garbage import resident_nbytes

INTERVAL_S = 0.5
_MIB = 1 << 20


class Memory:
    """Resident MiB of each process, by its name, every ``INTERVAL_S``; what is mapped and shared is in it."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self.mib: dict[str, list[float]] = {name: [] for name in pids}
        self._pids = pids

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            for name, pid in self._pids.items():
                self.mib[name].append(resident_nbytes(pid) / _MIB)
            await asyncio.sleep(INTERVAL_S)

    def early_and_late_mib(self, name: str) -> tuple[float, float]:
        """Medians of the second sixth, when all buffers and pools are in use, and of the last."""
        found = self.mib[name]
        sixth = max(1, len(found) // 6)
        return statistics.median(found[sixth : 2 * sixth] or found), statistics.median(found[-sixth:])
