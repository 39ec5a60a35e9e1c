"""make bench-gateway: tokens through one gateway process, from decode workers that compute nothing to clients over gRPC.

Workers, gateway and clients are processes of their own on this machine.  A core is a second of the gateway's own CPU time.
Latency counts from the drawing of a token to its reading by the client: both gRPC hops and the worker's loop are in it.
Each load is also put on a bare grpc.aio server, which sends every token as a message that was serialised before: a gateway
of one message a token can do no better.  "peers" are other gateways, over HTTP.
"""

from __future__ import annotations

import argparse
import os

from rich.console import Console

from tests.bench.gateway import peers
from tests.bench.gateway.run import ROOT, measure, measure_bare
from tests.bench.terminal import say
from tests.bench.transport.report import table, write_json
from tests.bench.transport.rows import Row, more_is_better, within

OUT = ROOT / "build" / "bench" / "gateway.json"
RATE_GOAL, LATENCY_GOAL_MS, STREAMS_GOAL = 25_000.0, 2.0, 5_000


def main() -> None:
    options = parse()
    console = Console()
    works = {
        "full load": (options.streams, RATE_GOAL),
        "half load": (options.streams, RATE_GOAL / 2),
        "many streams": (STREAMS_GOAL, RATE_GOAL / 2),
    }
    rows: list[Row] = []
    for name in (name for name in works if any(part in name for part in options.only)):
        num_streams, offered = works[name]
        runs, bare = [], []
        for _ in range(options.rounds):
            runs.append(measure(num_streams, offered, options))
            bare.append(measure_bare(num_streams, offered, options))
        what = f"{name}: {num_streams} streams, {offered:.0f} tokens/s offered"
        found = [run.tokens_per_core_s for run in runs]
        rows.append(more_is_better(f"{what}, per core / goal", found, [RATE_GOAL] * len(runs), 1.0, "tokens/s"))
        peer = [run.tokens_per_core_s for run in bare]
        rows.append(more_is_better(f"{what}, per core / bare grpc.aio", found, peer, 1.0, "tokens/s"))
        rows.append(
            more_is_better(f"{what}, delivered / offered", [run.tokens_per_s for run in runs],
                           [offered] * len(runs), 0.99, "tokens/s")
        )  # fmt: skip
        for quantile in ("p50", "p99"):
            found = [getattr(run, f"{quantile}_ms") for run in runs]
            rows.append(within(f"{what}, latency {quantile} / allowed", found, LATENCY_GOAL_MS, "ms"))
        for who, its in (("gateway", runs), ("bare grpc.aio", bare)):
            say(console, f"{what}, {who}: " + "; ".join(run.told() for run in its))
    if any(part in "peers" for part in options.only):
        rows += peers.compare(console, options)
    console.print(table(rows))
    write_json(rows, OUT)
    say(console, f"medians of {options.rounds} rounds; {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    say(console, f"latencies wrap at 2 s: believe none near it; wrote {OUT.relative_to(ROOT)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="that count of each (default: 3)")
    parser.add_argument("--streams", type=int, default=512, help="of full and half load (default: 512)")
    parser.add_argument("--workers", type=int, default=16, help="that the streams are spread over (default: 16)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured in a round (default: 5)")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="PART", help="by part of a name: full, half, many, peers"
    )
    parser.add_argument("--peer-streams", type=int, default=128, help="against the peers (default: 128)")
    parser.add_argument("--peer-rate", type=float, default=4000.0, help="tokens/s against the peers (default: 4000)")
    options = parser.parse_args()
    for name in ("rounds", "streams", "workers", "seconds", "peer_streams", "peer_rate"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} takes more than 0")
    return options


if __name__ == "__main__":
    main()
