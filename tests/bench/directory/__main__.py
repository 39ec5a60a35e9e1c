"""make bench-directory: the block index as the gateway uses it, against dynamo's RadixTree and fixed goals, with the same
data in both: longest prefixes of 256 blocks among 64 workers, events stored and removed, memory.

Each side takes events as its users get them, ours as bytes of protobuf and dynamo's as JSON, and both have to find the
same.  --trace replays a trace in Mooncake's format as well.

As processes: shared puts block events through two directories on one Redis; away and hang take the directory from a cluster
with the real model under load, killed or hung.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from tests.bench.directory import away, shared
from tests.bench.directory.processes import can_share
from tests.bench.directory.sides import INSTALL, Dynamo
from tests.bench.directory.works import Disagreement, Works, replayed
from tests.bench.terminal import say
from tests.bench.transport.report import table, write_json
from tests.bench.transport.rows import Row

ROOT = Path(__file__).resolve().parents[3]
OUT = ROOT / "build" / "bench" / "directory.json"
FILLED = ("memory", "lookup", "ingest")
WORKS = ("trace", *FILLED, "shared", "away", "hang")
SHARED_ROUNDS = 3
# Of one block, in both sides and the bench's own copy of its hash.
_NBYTES_PER_BLOCK = 160


def main() -> None:
    options = parse()
    console = Console()
    reason = Dynamo.why_missing()
    if reason and set(options.only) & {"trace", *FILLED}:
        say(console, f"not compared with dynamo ({reason}): {INSTALL}")
    try:
        rows = measure(console, options, with_peer=not reason)
    except Disagreement as error:
        sys.exit(str(error))
    console.print(table(rows))
    write_json(rows, OUT)
    load, cores = os.getloadavg()[0], os.cpu_count()
    say(console, f"medians of rounds, taken in turn; {cores} cores, load average {load:.1f}")
    say(console, f"wrote {OUT.relative_to(ROOT)}")


def measure(console: Console, options: argparse.Namespace, *, with_peer: bool) -> list[Row]:
    rows: list[Row] = []
    if "shared" in options.only:
        if can_share():
            rows += told(console, shared.measured(min(SHARED_ROUNDS, options.rounds)))
        else:
            say(console, "not measured: shared, because there is no redis-server; apt-get install redis-server")
    for name in ("away", "hang"):
        if name in options.only:
            rows += told(console, away.measured(options.away, hang=name == "hang"))
    if "trace" in options.only:  # first: dynamo's thread would still be busy with giving back the filled tree
        if options.trace:
            rows += replayed(options.trace, options.rounds, with_peer=with_peer)
        else:
            say(console, "not measured: trace, because none was given (--trace mooncake_conversation.jsonl)")
    names = [name for name in FILLED if name in options.only]
    if names:
        needed = options.blocks * _NBYTES_PER_BLOCK >> 20
        say(console, f"filling with {options.blocks:,} blocks; this takes about {needed:,} MiB")
        works = Works(options.blocks, options.rounds, with_peer=with_peer)
        say(console, f"{works.num_entries:,} pairs of block and worker")
        for name in names:
            rows += getattr(works, name)()
    return rows


def told(console: Console, found: tuple[list[Row], list[str]]) -> list[Row]:
    rows, lines = found
    for line in lines:
        say(console, line)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.directory", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="that count, of each work (default: 9)")
    parser.add_argument("--blocks", type=int, default=10_000_000, help="distinct blocks held (default: 10000000)")
    parser.add_argument("--trace", type=Path, help="a file in Mooncake's format, to be replayed")
    parser.add_argument("--away", type=float, default=30.0, help="seconds without a directory (default: 30)")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="works (default: all)")
    options = parser.parse_args()
    for name in ("rounds", "blocks", "away"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} takes 1 or more")
    if options.trace and not options.trace.is_file():
        parser.error(f"--trace: there is no file {options.trace}")
    return options


if __name__ == "__main__":
    main()
