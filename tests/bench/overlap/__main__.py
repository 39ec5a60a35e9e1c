"""make bench-overlap: what splitting adds to a long prompt, against the same prompt on one worker, in pairs.

One cluster with two gateways: one splits, the other has the decode worker compute every prompt.  Prompts are random
tokens, so no cache holds any of them.  The order within a pair alternates, and ratios are taken within pairs: a machine
that changes its speed, or is shared, moves them little.
"""

from __future__ import annotations

import argparse
import json
import statistics

from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvferry import Client
from tests.bench.overlap.pairs import Pair, interval, rows
from tests.bench.overlap.running import ROOT, cluster, measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overlap", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="pairs to measure (default: 15)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a prompt (default: 2048)")
    arguments = parser.parse_args()
    console = Console()
    running, split_address, single_address = cluster()
    console.print("starting a cluster with the real model, one thread a worker")
    pairs = []
    with running, Client(split_address) as split, Client(single_address) as single:
        for number in track(range(-1, arguments.rounds), f"pairs of {arguments.tokens} tokens", console=console):
            pair = measure(split, single, arguments.tokens, split_first=number % 2 == 0)
            if number >= 0:  # the first pair opens connections
                pairs.append(pair)
    report(console, pairs, arguments.tokens)


def report(console: Console, pairs: list[Pair], num_tokens: int) -> None:
    figures = {
        "TTFT split / on one worker": ([p.split_s / p.single_s for p in pairs], ".3f"),
        "prefill, s": ([p.prefill_s for p in pairs], ".2f"),
        "bytes hidden behind compute, %": ([100 * p.hidden_share for p in pairs], ".1f"),
        "exposed transfer, ms": ([1e3 * p.exposed_s for p in pairs], ".2f"),
        "exposed, % of prefill": ([100 * p.exposed_s / p.prefill_s for p in pairs], ".3f"),
        "last chunk to first decode step, ms": ([1e3 * p.handover_s for p in pairs], ".2f"),
        "of what it may take, %": ([100 * p.handover_s / p.allowed_s for p in pairs], ".1f"),
    }
    table = Table("figure", "median", "95 % interval")
    for name, (values, form) in figures.items():
        low, high = interval(values)
        table.add_row(name, f"{statistics.median(values):{form}}", f"{low:{form}} - {high:{form}}")
    console.print(table)
    made = rows(pairs, num_tokens)
    for row in made:
        console.print(f"{row['work']}: {row['ratio']:.3f}, goal at most {row['goal']}")
    out = ROOT / "build" / "bench" / "overlap.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(made, indent=1) + "\n")
    console.print(f"wrote {out.relative_to(ROOT)}; {len(pairs)} pairs, taken in turn in one run")


if __name__ == "__main__":
    main()
