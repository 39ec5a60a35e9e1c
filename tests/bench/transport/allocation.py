"""How long a process waits for its pool."""

from __future__ import annotations

from pathlib import Path

from tests.bench.transport.peers import KVFERRY
from tests.bench.transport.process import Process
from tests.bench.transport.rounds import rounds
from tests.bench.transport.rows import Row, within

NBYTES = 4 << 30
NEEDED_BYTES = 6 << 30
LIMIT_S = 1.0


def lacks_memory() -> str:
    """Why it cannot be measured here, or nothing."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if available >= NEEDED_BYTES:
        return ""
    return f"{available >> 20} MiB are available, {NEEDED_BYTES >> 20} are needed"


def measure(num_rounds: int) -> Row:
    """A new process each time.  A pool counts as allocated once all of it can be written without a fault."""
    taken_s = []
    for _ in rounds("allocating 4 GiB", num_rounds, num_warm_up=0):
        with Process(KVFERRY, "target", 1, NBYTES) as process:
            taken_s.append(process.ask("allocation_s"))
    return within(f"allocate and register {NBYTES >> 30} GiB vs {LIMIT_S:g} s", taken_s, LIMIT_S, "s")
