"""How long a process waits for its pool, and how long another one for the way into it."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.transport.peers import KVFERRY
from tests.bench.transport.process import Process
from tests.bench.transport.rounds import rounds
from tests.bench.transport.rows import Row, less_is_better, within

NBYTES = 4 << 30
NEEDED_BYTES = 6 << 30
SPARE_BYTES = 1 << 30
LIMIT_S = 1.0
OPENING_LIMIT_MS = 50.0
MADV_POPULATE_WRITE = 23  # Linux 5.14


def lacks_memory() -> str:
    """Why it cannot be measured here, or nothing."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if available >= NEEDED_BYTES:
        return ""
    return f"{available >> 20} MiB are available, {NEEDED_BYTES >> 20} are needed"


def measure(num_rounds: int) -> list[Row]:
    """New processes each time.  A pool counts as allocated once all of it can be written without a fault.

    A virtual machine gets memory from its host at the first touch, which takes seconds for 4 GiB whoever asks.  So a
    process that ends before takes it first, and the same bytes of anonymous memory are measured in between."""
    taken_s: list[float] = []
    anonymous_s: list[float] = []
    opening_ms: list[float] = []
    for _ in rounds("allocating 4 GiB", num_rounds, num_warm_up=0):
        touch_elsewhere(NBYTES + SPARE_BYTES)
        anonymous_s.append(touch_elsewhere(NBYTES))
        with Process(KVFERRY, "target", 1, NBYTES) as process:
            taken_s.append(process.ask("allocation_s"))
            with Process(KVFERRY, "initiator", 1, 4096) as neighbour:
                neighbour.ask("connect", description=process.ask("describe"))
                opening_ms.append(1e3 * neighbour.ask("opening_s"))
    size = f"{NBYTES >> 30} GiB"
    return [
        within(f"allocate and register {size} vs {LIMIT_S:g} s", taken_s, LIMIT_S, "s"),
        less_is_better(f"allocate and register {size} vs anonymous memory", taken_s, anonymous_s, 1.0, "s"),
        within(f"open a neighbour's {size} vs {OPENING_LIMIT_MS:g} ms", opening_ms, OPENING_LIMIT_MS, "ms"),
    ]


def touch_elsewhere(nbytes: int) -> float:
    """Seconds that a new process takes for so much anonymous memory in huge pages, all of it touched by one thread."""
    command = [sys.executable, "-m", "tests.bench.transport.allocation", str(nbytes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def touch(nbytes: int) -> float:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    began = time.monotonic()
    memory.madvise(MADV_POPULATE_WRITE)
    return time.monotonic() - began


if __name__ == "__main__":
    print(touch(int(sys.argv[1])))
