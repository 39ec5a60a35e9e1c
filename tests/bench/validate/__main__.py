"""make bench-validate: what `kvferry plan`'s simulator says of two fleets on this machine, against what they do.

One prefill and one decode worker, and two workers that do both, a core each, serve three loads: 0.3, 0.6 and 0.9 of the
highest rate at which the simulator says that they keep the objectives.  In the simulators the same requests arrive at the
same times.  Steps cost what the workers' own steps did during that load, as `kvferry calibrate --live` fits it ("in
service"), so that the simulators are held to account and not the drift of a shared machine; what they did during another
load ("of another load": the middle one's, and the heaviest one's for that), as who plans for other traffic would have it;
and what `kvferry calibrate` measured beforehand, on both cores at once ("before").  What lone requests take beside steps
is added.  Beside each figure stands what the load itself leaves open (±, 95 %).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from math import isfinite
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvferry.bench import slo
from kvferry.bench.slo import Slo
from services.planner.hardware import Measured
from services.planner.simulator.cost_model import CostModel
from tests.bench.split.fleets import Fleet
from tests.bench.system.systems import ROOT
from tests.bench.terminal import say
from tests.bench.validate import measured
from tests.bench.validate.load import Due, load
from tests.bench.validate.measured import FleetFound, Probe, calibrated_together, costs_of
from tests.bench.validate.resample import known_to
from tests.bench.validate.simulated import Figures, Serving, by_cores, by_plan, of_records, serving

OUT = ROOT / "build" / "bench" / "validate.json"
MEASURED = ROOT / "build" / "bench" / "validate-measured.json"
GOAL = 0.15
LEVELS = (0.3, 0.6, 0.9)
IN_SERVICE, OTHER, BEFORE = "in service", "of another load", "before"
FEWEST_REQUESTS = 5  # to be expected of a load
CHUNK = 64
# So that a step with a chunk takes about what one of many sequences does: of steps that take either 5 or 45 ms a percentile
# between the two says nothing.
MIXED = 8
KNEE_SHARE, KNEE_SECONDS, MOST_RATE, KNEE_STEPS = 0.9, 300.0, 20.0, 10


def knee(fleet: Fleet, costs: Measured, served: Serving, objectives: Slo, seed: int) -> float:
    """The highest rate that the plan's simulator says 90 % of the requests are good at."""
    low, high = 0.0, MOST_RATE
    for _ in range(KNEE_STEPS):
        rate = (low + high) / 2
        if by_plan(fleet, costs, served, load(rate, KNEE_SECONDS, seed), objectives).good >= KNEE_SHARE:
            low = rate
        else:
            high = rate
    return low


def take(options: argparse.Namespace, objectives: Slo, console: Console) -> None:
    calibrations = calibrated_together(options.rounds)
    before = costs_of(calibrations)
    found = []
    for fleet in (
        Fleet("split", 1, 1, CHUNK, options.mixed), Fleet("colocated", 0, 2, CHUNK, options.mixed)
    ):  # fmt: skip

        def loads(probes: Sequence[Probe], costs: CostModel, fleet: Fleet = fleet) -> list[tuple[float, list[Due]]]:
            served = serving(probes, fleet)
            highest = knee(fleet, replace(before, costs=costs), served, objectives, options.seed)
            say(console, f"{fleet.name}: {highest:.2f} requests/s at the knee, by the plan's simulator; {told(costs)}; "
                         f"door {1e3 * served.door_s:.1f} ms, handover {1e3 * served.handover_s:.1f} ms")  # fmt: skip
            if LEVELS[0] * highest * options.seconds < FEWEST_REQUESTS:
                raise SystemExit(
                    f"bench-validate: {options.seconds:g} s of the lightest load would be fewer than {FEWEST_REQUESTS} "
                    "requests; ask for less with --slo, or give more --seconds"
                )
            return [(f * highest, load(f * highest, options.seconds, options.seed)) for f in LEVELS]

        found.append(measured.measure(fleet, loads, options.seed))
    measured.write(options.measured, calibrations, found)


def told(costs: CostModel) -> str:
    return (
        f"step {1e3 * costs.step_s:.2f} ms, prompt token {1e6 * costs.prefill_token_s:.0f} µs, pair "
        f"{1e9 * costs.attention_pair_s:.0f} ns, sequence {1e6 * costs.decode_sequence_s:.0f} µs, context "
        f"{1e9 * costs.decode_context_token_s:.0f} ns"
    )


def compare(
    found: Sequence[FleetFound], before: Measured, objectives: Slo, console: Console
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    drawn = Table("fleet", "requests/s", "simulator", "costs", *Figures.__dataclass_fields__)
    sure: list[bool] = []  # of each measured figure
    for each in found:
        served = serving(each.probes, each.fleet)
        for number, loaded in enumerate(each.loads):
            other = each.loads[2 if number == 1 else 1]
            say(console, f"{each.fleet.name}, {loaded.rate:.2f}/s: {told(loaded.costs)}")
            real = of_records(loaded.records, objectives)
            failed = sum(record.error is not None for record in loaded.records)
            at = each.fleet.name, f"{loaded.rate:.2f}"
            off = known_to(loaded.records, objectives)
            sure += [share <= GOAL for share in asdict(off).values()]
            requests = f"{len(loaded.records)} requests, {failed} failed"
            drawn.add_row(*at, "measured", requests, *map(_figure, asdict(real).values(), asdict(off).values()))
            for (name, simulate), (whose, costs) in product(
                (("plan", by_plan), ("cores", by_cores)),
                ((IN_SERVICE, loaded.costs), (OTHER, other.costs), (BEFORE, before.costs)),
            ):
                made = simulate(each.fleet, replace(before, costs=costs), served, loaded.dues, objectives)
                ratios = {
                    k: v / r if r else float("nan")
                    for (k, v), r in zip(asdict(made).items(), asdict(real).values(), strict=True)
                }
                drawn.add_row(*at, name, whose, *map(_ratio, ratios.values()))
                rows.append({"fleet": at[0], "rate": loaded.rate, "simulator": name, "costs": whose, "ratios": ratios,
                             "measured": asdict(real), "known_to": asdict(off), "simulated": asdict(made)})  # fmt: skip
    console.print(drawn)
    for name, whose in product(("plan", "cores"), (IN_SERVICE, OTHER, BEFORE)):
        all_of = [
            ratio for row in rows if (row["simulator"], row["costs"]) == (name, whose)
            for ratio in row["ratios"].values()  # type: ignore[attr-defined]
        ]  # fmt: skip
        near = [abs(r - 1) <= GOAL for r in all_of]
        sure_near = sum(n and s for n, s in zip(near, sure, strict=True))
        say(console, f"{name}, costs {whose}: {sum(near)} of {len(near)} figures within {GOAL:.0%}; "
                     f"{sure_near} of the {sum(sure)} that the loads say so well")  # fmt: skip
    return rows


def _figure(value: float, off: float) -> str:
    return f"{value:.4g} ± {f'{off:.0%}' if isfinite(off) else '?'}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" + ("" if abs(value - 1) <= GOAL else " *")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-validate", description=__doc__)
    parser.add_argument("--slo", default="ttft=5s,itl=300ms", help="what a good request keeps (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=200.0, help="of each load (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of the calibration")
    parser.add_argument(
        "--mixed", type=int, default=MIXED, help="prompt tokens in a step beside streams (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="simulate what was measured last, and measure nothing")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="where it is kept (default: %(default)s)")
    options = parser.parse_args()
    console, objectives = Console(width=160), slo.parse(options.slo)
    if not options.again:
        take(options, objectives, console)
    calibrations, found = measured.read(options.measured)
    rows = compare(found, costs_of(calibrations), objectives, console)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1))
    say(console, f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; wrote {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
