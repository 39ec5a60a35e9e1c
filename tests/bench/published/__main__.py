"""make bench-published: `kvferry plan`'s simulator against what Splitwise and DistServe report, each with its own model,
machines, lengths, objectives and rival."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from rich.console import Console

from services.planner.hardware import DEFAULT_CATALOGUE, read_catalogue
from tests.bench.published import distserve, splitwise
from tests.bench.published.points import NEAR, Point, is_near
from tests.bench.terminal import say

PAPERS = ("distserve", "splitwise")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-published", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="arrival orders, of which most must keep the objectives")
    parser.add_argument(
        "--requests", type=int, default=1000, help="of a run; Splitwise needs some 4000 to fill its machines"
    )
    parser.add_argument("--spread", type=float, default=0.5, help="of DistServe's lengths: standard deviation to mean")
    parser.add_argument("--only", choices=PAPERS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console()
    catalogue = read_catalogue(DEFAULT_CATALOGUE)
    seeds = range(args.rounds)
    rows = []
    for paper in PAPERS:
        if args.only not in (None, paper):
            continue
        say(console, f"{paper}: published, simulated with the paper's step times, with the catalogue's (ratios)")
        found = (
            distserve.points(catalogue, args.spread, args.requests, seeds)
            if paper == "distserve"
            else splitwise.points(catalogue, args.requests, seeds)
        )
        for point in found:
            say(console, _line(point))
            rows.append({"paper": paper, **point.as_row()})
    if args.json:
        args.json.write_text(json.dumps([{k: _finite(v) for k, v in row.items()} for row in rows], indent=1))


def _line(point: Point) -> str:
    published = point.published
    figure = f"{published.low:.4g}" if published.low == published.high else f"{published.low:g} to {published.high:g}"
    simulated = ", ".join(_simulated(point, each) for each in (point.profiled, point.roofline))
    note = f"; {point.note}" if point.note else ""
    return f"  {published.name}: {figure} {published.unit}, {simulated}{note} [{published.source}]"


def _simulated(point: Point, value: float | None) -> str:
    ratio = point.ratio(value)
    if value is None or ratio is None:
        return "-"
    return f"{value:.4g} ({ratio:.2f}{'' if is_near(ratio) else f', off by more than {NEAR:.0%}'})"


def _finite(value: object) -> object:
    """JSON knows no infinity: where the rival keeps the objectives at no rate there is no ratio."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
