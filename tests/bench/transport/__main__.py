"""make bench-transport: blocks between two processes, against memcpy, NIXL and Mooncake, as ratios taken in one run."""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console

from tests.bench.terminal import require_parts, say
from tests.bench.transport import allocation
from tests.bench.transport.peers import MEMCPY, MOONCAKE, NIXL, NIXL_LEAN
from tests.bench.transport.process import ROOT, Process, SideFailed
from tests.bench.transport.report import table, write_json
from tests.bench.transport.rows import Row
from tests.bench.transport.works import works

OUT = ROOT / "build" / "bench" / "transport.json"


def main() -> None:
    console = Console()
    options = parse()
    missing = {library for library in (NIXL, NIXL_LEAN, MOONCAKE) if library.why_missing()}
    for library in (NIXL, MOONCAKE):
        if library in missing:
            say(console, f"not compared with {library.name} ({library.why_missing()}): {library.install}")
    rows: list[Row] = []
    for name, measure in works(missing).items():
        if not any(part in name for part in options.only):
            continue
        if name == "allocation" and (reason := allocation.lacks_memory()):
            say(console, f"not measured: {name}, because {reason}")
            continue
        try:
            rows += measure(options.rounds)
        except SideFailed as e:
            sys.exit(f"{name}: {e}")
        except KeyboardInterrupt:
            sys.exit(130)
    console.print(table(rows))
    write_json(rows, OUT)
    with Process(MEMCPY, "initiator", 2048, 65536) as process:
        say(console, f"memcpy ran between two of the transport's own regions: {process.ask('describe')}")
    if NIXL_LEAN not in missing:
        say(console, "NIXL lean has no progress thread in the initiator: better where cores are few")
    load, cores = os.getloadavg()[0], os.cpu_count()
    say(console, f"medians of {options.rounds} rounds, taken in turn; {cores} cores, load average {load:.1f}")
    say(console, f"wrote {OUT.relative_to(ROOT)}")


def parse() -> argparse.Namespace:
    names = list(works(()))
    parser = argparse.ArgumentParser(prog="python -m tests.bench.transport", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="that count, of each work; quote none of fewer than 15")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="PART", help=f"works by part of a name: {', '.join(names)}"
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds takes 1 or more")
    require_parts(parser, "work", options.only, names)
    return options


if __name__ == "__main__":
    main()
