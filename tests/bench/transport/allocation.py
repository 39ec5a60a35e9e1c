"""How long a process waits for its pool, and how long another one for the way into it."""

from __future__ import annotations

from pathlib import Path

from tests.bench.transport.peers import KVFERRY
from tests.bench.transport.process import Process
from tests.bench.transport.rounds import rounds
from tests.bench.transport.rows import Row, within

NBYTES = 4 << 30
NEEDED_BYTES = 6 << 30
LIMIT_S = 1.0
OPENING_LIMIT_MS = 50.0


def lacks_memory() -> str:
    """Why it cannot be measured here, or nothing."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if available >= NEEDED_BYTES:
        return ""
    return f"{available >> 20} MiB are available, {NEEDED_BYTES >> 20} are needed"


def measure(num_rounds: int) -> list[Row]:
    """New processes each time.  A pool counts as allocated once all of it can be written without a fault."""
    taken_s: list[float] = []
    opening_ms: list[float] = []
    for _ in rounds("allocating 4 GiB", num_rounds, num_warm_up=0):
        with Process(KVFERRY, "target", 1, NBYTES) as process:
            taken_s.append(process.ask("allocation_s"))
            with Process(KVFERRY, "initiator", 1, 4096) as neighbour:
                neighbour.ask("connect", description=process.ask("describe"))
                opening_ms.append(1e3 * neighbour.ask("opening_s"))
    size = f"{NBYTES >> 30} GiB"
    return [
        within(f"allocate and register {size} vs {LIMIT_S:g} s", taken_s, LIMIT_S, "s"),
        within(f"open a neighbour's {size} vs {OPENING_LIMIT_MS:g} ms", opening_ms, OPENING_LIMIT_MS, "ms"),
    ]
