"""make bench-plan: how many requests a minute the coarse fleet simulator takes on one core."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from gateway.admission import PATIENCE
from services.planner.designs import Design, Size, fleet
from services.planner.fleet import simulate
from services.planner.hardware import DEFAULT_CATALOGUE, make_worker, read_catalogue
from services.planner.models import find_model
from services.planner.traffic import Traffic
from tests.bench.plan import peer
from tests.bench.terminal import say

GOAL_PER_MINUTE = 1e6
# Prompts and answers of a chat's length; requests a second and worker.
PROMPT, ANSWER, SIGMA, RATE = 1500.0, 250.0, 0.7, 6.0
SIZES = {
    "8 colocated": (Size(0, 8), 8),
    "4 + 4": (Size(4, 4), 8),
    "1000 colocated": (Size(0, 1000), 1000),
    "500 + 500": (Size(500, 500), 1000),
    "10000 colocated": (Size(0, 10_000), 10_000),
}


def load(count: int, rate: float) -> Traffic:
    random = np.random.default_rng(0)
    lengths = [
        np.maximum(1, random.lognormal(np.log(median), SIGMA, count)).astype(np.int32) for median in (PROMPT, ANSWER)
    ]
    return Traffic(np.cumsum(random.exponential(1 / rate, count)), *lengths, np.zeros(count, np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-plan", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console()
    worker = make_worker(find_model("llama-3.1-8b"), read_catalogue(DEFAULT_CATALOGUE).devices["h100"], 1, "bf16")
    assert worker is not None
    rows: list[dict[str, object]] = []
    for name, (size, num_workers) in SIZES.items():
        traffic = load(args.requests, RATE * num_workers)
        design = (
            Design.split(worker, worker, 2048, PATIENCE)
            if size.num_prefill
            else Design.colocated(worker, 2048, PATIENCE)
        )
        made = fleet(design, size)
        seconds, steps = [], 0
        for _ in range(args.rounds):
            began = time.process_time()
            steps = simulate(made, traffic).num_steps
            seconds.append(time.process_time() - began)
        per_minute = args.requests / statistics.median(seconds) * 60
        rows.append({"work": name, "requests_per_minute": per_minute, "goal": GOAL_PER_MINUTE})
        say(
            console,
            f"{name}: {per_minute / 1e6:.1f} M requests a minute of one core (goal 1), "
            f"{steps / args.requests:.1f} steps each",
        )
    rows += _beside_peer(console)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def _beside_peer(console: Console) -> list[dict[str, object]]:
    """Nothing where the peer is not installed."""
    try:
        from dynamo._core import run_mocker_trace_replay  # type: ignore[import-not-found]
    except ImportError:
        say(console, "peer: skipped, ai-dynamo-runtime is not installed (pip install --no-deps ai-dynamo-runtime)")
        return []
    traffic = load(peer.NUM_REQUESTS, peer.RATE)
    traffic = replace(traffic, arrive_s=np.round(traffic.arrive_s, 3))  # the peer's trace has milliseconds
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        both = {"ours": peer.ours, "peer": peer.theirs(run_mocker_trace_replay, Path(folder) / "trace.jsonl")}
        for name, simulator in both.items():
            for size in peer.SIZES:
                found = simulator(traffic, size)
                say(
                    console,
                    f"{name}, {size}: {len(traffic) / found.cpu_s:.0f} requests a second of one core, "
                    f"TTFT p50 {found.ttft_p50:.3f}, p90 {found.ttft_p90:.3f} s, "
                    f"TPOT p50 {found.tpot_p50 * 1e3:.1f}, p90 {found.tpot_p90 * 1e3:.1f} ms",
                )
                rows.append({"work": f"{name}, {size}", **asdict(found)})
            colocated, split = peer.fewest_workers(simulator, traffic)
            say(console, f"{name}: the fewest workers that do are {colocated}, or {split}")
            rows.append({"work": f"{name}, fewest", "colocated": str(colocated), "split": str(split)})
    return rows


if __name__ == "__main__":
    main()
