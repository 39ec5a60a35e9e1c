"""make bench-scale: what a request and a change cost with 10 to 10,000 workers, by the real cores of directory and gateway
in one process: no socket, so figures are floors.  Of processor time, which others on the machine change little.
With --simulate, what clients of fleets wait in virtual time (simulation.py).  docs/scale.md says what follows."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gateway.costs import Demand
from gateway.routing import choose_route
from kvferry.api.directory.v1 import directory_pb2
from tests.bench.routing.__main__ import measured_costs
from tests.bench.scale.cluster import BLOCK_SIZE, NUM_BLOCKS, Cluster
from tests.bench.scale.simulation import Shape, simulate
from tests.bench.terminal import say

ROOT = Path(__file__).resolve().parents[3]
OUT = ROOT / "build" / "bench" / "scale.json"
SIMULATED = ROOT / "build" / "bench" / "scale-simulated.json"
DEMAND = Demand(num_prompt_tokens=NUM_BLOCKS * BLOCK_SIZE + 100, max_tokens=64)
# Work that takes longer is done once: its rounds would say no more.
_LONG_S = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000, 10_000], metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of which the median is told")
    parser.add_argument(
        "--simulate",
        type=Shape.of,
        nargs="+",
        metavar="CELLSxWORKERS",
        help="instead: fleets in virtual time, such as 10x100",
    )
    parser.add_argument(
        "--costs", type=Path, help="of steps in them: read where the file is there, else measured and written"
    )
    options = parser.parse_args()
    console = Console()
    if options.simulate:
        costs, block_nbytes = measured_costs(console, options.costs, options.rounds)
        tell(
            console,
            "cells x workers",
            {str(each): simulate(each, costs, block_nbytes) for each in options.simulate},
            SIMULATED,
        )
    else:
        tell(console, "ms", {f"{size:,}": measure(size, options.rounds) for size in options.sizes}, OUT)


def tell(console: Console, heading: str, found: dict[str, dict[str, float]], file: Path) -> None:
    table = Table(heading, *found)
    for name in next(iter(found.values())):
        table.add_row(name, *(f"{each[name]:.3g}" for each in found.values()))
    console.print(table)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1))
    say(console, f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; wrote {file.relative_to(ROOT)}")


def measure(num_workers: int, rounds: int) -> dict[str, float]:
    """Milliseconds, by what takes them."""
    cluster = Cluster(num_workers)
    candidates = cluster.candidates()
    turns = iter(range(1, 1_000_000))

    def every_worker_speaks() -> None:
        turn = next(turns)
        for number in range(num_workers):
            cluster.keep_alive(number, turn)

    gc.freeze()
    figures = {
        "request: prefix lookup": timed(lambda: cluster.view.longest_prefix([cluster.prompt]), rounds),
        "request: lookup, and view to candidates": timed(cluster.candidates, rounds),
        "request: choose route": timed(lambda: choose_route(candidates, DEMAND), rounds),
        "every worker speaks once: directory": timed(every_worker_speaks, rounds),
    }
    revision = cluster.state.revision
    every_worker_speaks()
    news = cluster.news(revision)
    figures["... and is told to one gateway: directory"] = timed(lambda: cluster.news(revision), rounds)
    figures["... and is told to one gateway: gateway"] = timed(lambda: heard(cluster, news), rounds)
    figures["... and is told to one gateway: MB"] = sum(map(len, news)) / 1e6
    revision, sequences = cluster.state.revision, iter(range(2, 1_000_000))
    figures[f"{NUM_BLOCKS} blocks stored: directory"] = timed(lambda: cluster.store_blocks(next(sequences)), rounds)
    stored = cluster.news(revision)
    figures[f"{NUM_BLOCKS} blocks stored: directory, for a gateway"] = (
        timed(lambda: cluster.news(revision), rounds) / rounds
    )
    figures[f"{NUM_BLOCKS} blocks stored: gateway"] = timed(lambda: heard(cluster, stored), 1) / rounds
    figures["a gateway starts: directory"] = timed(cluster.snapshot, rounds)
    figures["a gateway starts: MB"] = sum(map(len, cluster.snapshot())) / 1e6
    cluster.view.check_integrity()
    return figures


def heard(cluster: Cluster, news: list[bytes]) -> None:
    for response in news:
        cluster.view.apply(directory_pb2.WatchResponse.FromString(response))


def timed(work: Callable[[], object], rounds: int) -> float:
    """The median, in milliseconds of processor time."""
    taken: list[float] = []
    for _ in range(rounds):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
        if taken[-1] > _LONG_S:
            break
    return statistics.median(taken) * 1000


if __name__ == "__main__":
    main()
