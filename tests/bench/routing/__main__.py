"""make bench-routing: what routing policies make of loads with shared prefixes, on four workers, in virtual time.

The gateway's rules, the schedulers and the pools are the real ones; how long a step takes is a line through measured steps
of the real engine on this machine.  ``informed`` is kv-aware with a view that is never old; ``oracle`` tries every option
of every request on the future as it will be, and takes the one with which callers wait least for first tokens (oracle.py).
It cares for nothing else; nor does ``soon``, which is kv-aware with a --stall-weight of 1.  ``one cache`` is a single
worker with room for everything, which takes no time: nobody can hit more.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gateway.candidates import Role
from gateway.routing import Policy
from services.engine.checkpoint import DEFAULT_MODEL
from services.engine.scheduler import Limits
from services.planner.simulator.arrivals import Served
from services.planner.simulator.cluster import ByPolicy, Cluster, ViewDelays
from services.planner.simulator.cost_model import CostModel
from services.planner.simulator.worker import WorkerSpec
from services.worker.pins import PINNED_SHARE
from tests.bench.routing.loads import LOADS
from tests.bench.routing.oracle import Oracle
from tests.bench.terminal import say

# kv-aware with a view that is never old; with a stall weight of 1; one that knows everything; one worker for all.
INFORMED, SOON, ORACLE, ONE_CACHE = "informed", "soon", "oracle", "one cache"
NAMES = [*(policy.value for policy in Policy), INFORMED, SOON, ONE_CACHE]
SHAPES = {"2+2": (2, 2), "0+4": (0, 4)}  # prefill and decode workers
HIT_GOAL, TTFT_GOAL, ORACLE_GOAL = 2.0, 0.6, 1.05
HORIZON_S = 15.0
NO_TIME = CostModel(1e-6, 0.0, 0.0, 0.0, 0.0, 0.0, 1e12)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's, two-sided, by the number of seeds


@dataclass(frozen=True, slots=True)
class Figures:
    hit_rate: float
    ttft_s: float
    ttft_p90_s: float
    itl_s: float


def specs(shape: str, num_blocks: int, block_nbytes: int) -> list[WorkerSpec]:
    limits = Limits(block_size=16, context_length=8192, max_pinned=num_blocks // PINNED_SHARE)
    roles = [Role.PREFILL] * SHAPES[shape][0] + [Role.DECODE] * SHAPES[shape][1]
    return [WorkerSpec(f"w{n}", role, num_blocks, block_nbytes, limits, host="one") for n, role in enumerate(roles)]


def figures(served: Sequence[Served]) -> Figures:
    ttfts = sorted(s.ttft_s for s in served)
    return Figures(
        hit_rate=sum(s.num_cached for s in served) / sum(s.num_prompt for s in served),
        ttft_s=statistics.fmean(ttfts),
        ttft_p90_s=ttfts[int(0.9 * len(ttfts))],
        itl_s=statistics.fmean(s.itl_s for s in served),
    )


def simulate(name: str, load: str, rate: float, seed: int, workers: Sequence[WorkerSpec], costs: CostModel) -> Figures:
    fresh = ViewDelays(0.0, 0.0)
    arrivals = LOADS[load](rate, seed)
    if name == ORACLE:
        oracle = Oracle(lambda served: served.ttft_s, HORIZON_S)
        cluster = Cluster(workers, costs, oracle, fresh, objectives=None)
        served = oracle.run(cluster, arrivals)
    elif name == INFORMED:
        cluster = Cluster(workers, costs, Policy.KV_AWARE, fresh, objectives=None)
        served = cluster.run(arrivals)
    elif name == SOON:
        cluster = Cluster(workers, costs, ByPolicy(Policy.KV_AWARE, stall_weight=1.0), objectives=None)
        served = cluster.run(arrivals)
    elif name == ONE_CACHE:
        one = replace(workers[-1], num_blocks=100 * workers[-1].num_blocks)
        cluster = Cluster([one], NO_TIME, Policy.ROUND_ROBIN, objectives=None)
        served = cluster.run(arrivals)
    else:
        cluster = Cluster(workers, costs, Policy(name), objectives=None)
        served = cluster.run(arrivals)
    cluster.check_integrity()
    return figures(served)


def interval(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {half:.3f}"


def rows(where: str, found: dict[str, list[Figures]]) -> list[dict[str, object]]:
    """Ratios within a seed, then their mean."""

    def row(
        work: str, peer: str, quantity: str, goal: float, unit: str, who: str = Policy.KV_AWARE.value
    ) -> dict[str, object]:
        ours = [getattr(f, quantity) for f in found[who]]
        theirs = [getattr(f, quantity) for f in found[peer]]
        ours = ours[: len(theirs)]  # the oracle is asked of fewer seeds
        ratio = statistics.fmean(a / max(b, 1e-9) for a, b in zip(ours, theirs, strict=True))
        return {
            "work": f"{where}, {work}", "ours": statistics.fmean(ours), "peer": statistics.fmean(theirs),
            "ratio": round(ratio, 3), "goal": goal, "unit": unit,
        }  # fmt: skip

    told = [
        row("hit rate to round-robin's", "round-robin", "hit_rate", HIT_GOAL, "share"),
        row("hit rate to what is possible", ONE_CACHE, "hit_rate", 1 / ORACLE_GOAL, "share"),
        row("TTFT to round-robin's", "round-robin", "ttft_s", TTFT_GOAL, "s"),
    ]
    if ORACLE in found:
        told.append(row("TTFT to the oracle's", ORACLE, "ttft_s", ORACLE_GOAL, "s"))
        told.append(row("TTFT to the oracle's, with a stall weight of 1", ORACLE, "ttft_s", ORACLE_GOAL, "s", SOON))
        told.append(row("hit rate to the oracle's", ORACLE, "hit_rate", 1 / ORACLE_GOAL, "share"))
    return told


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-routing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of each step that is measured")
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(T_95))
    parser.add_argument("--rates", type=float, nargs="+", default=[4.0], help="requests/s")
    parser.add_argument(
        "--oracle", type=int, default=0, metavar="SEEDS", help="ask the oracle of so many seeds: about a minute each"
    )
    parser.add_argument("--blocks", type=int, default=1024, help="of 16 tokens, on each worker")
    parser.add_argument(
        "--costs", type=Path, help="a cost model: read where the file is there, else measured and written"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console()
    costs, block_nbytes = measured_costs(console, args.costs, args.rounds)
    told: list[dict[str, object]] = []
    for load in LOADS:
        for shape in SHAPES:
            workers = specs(shape, args.blocks, block_nbytes)
            for rate in args.rates:
                where = f"{load}, {shape}, {rate:g}/s"
                found = {
                    name: [simulate(name, load, rate, seed, workers, costs) for seed in range(args.seeds)]
                    for name in NAMES
                }
                if args.oracle:
                    seeds = range(min(args.oracle, args.seeds))
                    found[ORACLE] = [simulate(ORACLE, load, rate, seed, workers, costs) for seed in seeds]
                console.print(_table(where, found))
                told += rows(where, found)
    for row in told:
        say(console, f"{row['work']}: {row['ratio']} (goal {row['goal']})")
    if args.json:
        args.json.write_text(json.dumps(told, indent=1))


def measured_costs(console: Console, path: Path | None, rounds: int) -> tuple[CostModel, int]:
    """With the bytes of a block; of ``path`` where it is there."""
    if path is not None and path.exists():
        read = json.loads(path.read_text())
        return CostModel(**read["costs"]), read["block_nbytes"]
    from services.planner.calibrate.steps import calibrate  # with the engine, which the rest does without

    found = calibrate(DEFAULT_MODEL, "auto", 1, rounds, lambda done, total, what: None)
    say(console, f"measured: {found.costs}; the median step is off by {found.fit.median_error:.1%}")
    if path is not None:
        path.write_text(json.dumps(found.content()))
    return found.costs, found.block_nbytes


def _table(where: str, found: dict[str, list[Figures]]) -> Table:
    table = Table("policy", "hit rate", "TTFT s", "TTFT p90 s", "ITL s", title=where)
    for name, each in found.items():
        table.add_row(name, *(interval([getattr(f, q) for f in each]) for q in Figures.__slots__))
    return table


if __name__ == "__main__":
    main()
