"""What processes hold, by Linux's account of them."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from tests.soak.trend import Held, Trend, trend


class Samples:
    """Of named processes, taken at equal times."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, Held], list[float]] = defaultdict(list)

    def take(self, pids: dict[str, int]) -> None:
        """Raises OSError when one of them has ended."""
        for name, pid in pids.items():
            status = _status(pid)
            # Without clean pages of files, which weights are mapped from: the kernel drops those as it likes.
            self.series[name, Held.MEMORY].append((status["RssAnon"] + status["RssShmem"]) / 1024)
            self.series[name, Held.DESCRIPTORS].append(len(os.listdir(f"/proc/{pid}/fd")))
            self.series[name, Held.THREADS].append(status["Threads"])

    def trends(self) -> list[Trend]:
        return [trend(name, held, series) for (name, held), series in self.series.items()]


def _status(pid: int) -> dict[str, int]:
    """The numbers of ``/proc/<pid>/status``; sizes in KiB."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if (words := value.split()) and words[0].isdigit():
            found[name] = int(words[0])
    return found
