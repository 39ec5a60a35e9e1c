"""What processes hold, by Linux's account of them."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from tests.soak.trend import Held, Trend, trend

# What they map together, each page counted once: a worker maps a peer's whole pool with the first block that it reads.
SHARED = "shared"


class Samples:
    """Of named processes, taken at equal times."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, Held], list[float]] = defaultdict(list)

    def take(self, pids: dict[str, int]) -> None:
        """Raises OSError when one of them has ended."""
        shared = 0
        for name, pid in pids.items():
            status = _numbers(f"/proc/{pid}/status")
            # Without clean pages of files, which weights are mapped from: the kernel drops those as it likes.
            self.series[name, Held.MEMORY].append(status["RssAnon"] / 1024)
            shared += _numbers(f"/proc/{pid}/smaps_rollup")["Pss_Shmem"]
            self.series[name, Held.DESCRIPTORS].append(len(os.listdir(f"/proc/{pid}/fd")))
            self.series[name, Held.THREADS].append(status["Threads"])
        self.series[SHARED, Held.MEMORY].append(shared / 1024)

    def trends(self) -> list[Trend]:
        return [trend(name, held, series) for (name, held), series in self.series.items()]


def _numbers(path: str) -> dict[str, int]:
    """By name; sizes in KiB."""
    found = {}
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if (words := value.split()) and words[0].isdigit():
            found[name] = int(words[0])
    return found
