"""make bench-overlap: what splitting adds to a long prompt, against the same prompt on one worker, in pairs.

One cluster with two gateways: one splits, the other has the decode worker compute every prompt.  Prompts are random
tokens, so no cache holds any of them.  The order within a pair alternates, and ratios are taken within pairs: a machine
that changes its speed, or is shared, moves them little.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvferry import Client, Timeline
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterConfig, Member, Role, clone_root, plan
from kvferry.cli.ports import LOOPBACK, join, pick_free
from tests.bench.overlap.pairs import Pair, interval, rows

ROOT = Path(__file__).resolve().parents[3]
NUM_STEPS = 4
NEVER_SHIP = 1_000_000


def cluster() -> tuple[LocalCluster, str, str]:
    """Not started yet, with the addresses of the gateway that splits and of the one that does not."""
    planned = plan(ClusterConfig(grpc_port=0, http_port=0, threads=1, kv_memory="1GiB"), clone_root())
    splits = planned.members[-1]
    single, http = (join(LOOPBACK, port) for port in pick_free(2))
    flags = ("--listen", single, "--http-listen", http, "--min-ship-tokens", str(NEVER_SHIP))  # the last of a flag wins
    other = Member("single", Role.GATEWAY, (*splits.command, *flags), single, cwd=splits.cwd)
    members = (*planned.members, other)
    return LocalCluster(members, ROOT / "build/logs/bench-overlap", restart=False), planned.grpc_address, single


def ask(client: Client, num_tokens: int) -> tuple[float, Timeline]:
    """Seconds to the first token, and the rest of the story."""
    prompt = [random.randrange(1000, 40000) for _ in range(num_tokens)]
    began = time.perf_counter()
    with client.generate(prompt, max_tokens=NUM_STEPS + 1, temperature=0, ignore_eos=True, timeout=600) as stream:
        next(chunk for chunk in stream if chunk.tokens)
        ttft_s = time.perf_counter() - began
        return ttft_s, stream.result().timeline


def measure(split: Client, single: Client, num_tokens: int, split_first: bool) -> Pair:
    taken = {}
    for client in (split, single) if split_first else (single, split):
        taken[client] = ask(client, num_tokens)
    (split_s, timeline), (single_s, alone) = taken[split], taken[single]
    prefill, transfer, handover_s = timeline.prefill, timeline.transfer, timeline.handover_s
    if prefill is None or transfer is None or handover_s is None or alone.transfer is not None:
        raise RuntimeError(f"not split as it should be: {timeline.route_reason}; {alone.route_reason}")
    return Pair(
        split_s,
        single_s,
        prefill.compute_s,
        transfer.exposed_s,
        handover_s,
        transfer.num_hidden_bytes / transfer.num_bytes,
    )


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
