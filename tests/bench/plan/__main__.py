"""make bench-plan: how many requests a minute the coarse fleet simulator takes on one core."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from services.planner.designs import Design, Size, fleet
from services.planner.fleet import simulate
from services.planner.hardware import DEFAULT_CATALOGUE, make_worker, read_catalogue
from services.planner.models import find_model
from services.planner.traffic import Traffic
from tests.bench.terminal import say

GOAL_PER_MINUTE = 1e6
# Prompts and answers of a chat's length; requests a second and worker.
PROMPT, ANSWER, SIGMA, RATE = 1500.0, 250.0, 0.7, 6.0
SIZES = {
    "8 colocated": (Size(0, 8), 8),
    "4 + 4": (Size(4, 4), 8),
    "1000 colocated": (Size(0, 1000), 1000),
    "500 + 500": (Size(500, 500), 1000),
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
    rows = []
    for name, (size, num_workers) in SIZES.items():
        traffic = load(args.requests, RATE * num_workers)
        made = fleet(Design(worker, worker if size.num_prefill else None, 2048), size)
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
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
