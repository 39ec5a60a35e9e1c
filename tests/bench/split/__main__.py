"""make bench-split: the same two cores as one prefill and one decode worker, and as two workers that do both.

Streams of short prompts run while long prompts arrive, at rising rates.  Beside streams the colocated workers cut
prompts into chunks; to the split fleet's decode worker prompts are sent as what its streams lose weighs.  Which size,
which weight, and which bound of the gateway's serves a fleet best is tried first.  Workers have a core each; clients
and gateway take what these leave.  Latencies count from when a request was due.  A request is good that keeps the
objectives; the quiet value is the same fleet's, under the same streams without long prompts.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from kvferry.bench import slo
from kvferry.bench.plots import Line, plot
from kvferry.bench.record import Record, percentile
from kvferry.bench.slo import Slo
from services.worker.config import MIXED_SHARE
from tests.bench.split.fleets import Fleet, measure
from tests.bench.split.load import Mix, is_stream
from tests.bench.system.systems import ROOT
from tests.bench.terminal import say
from tests.bench.transport.report import table, write_json
from tests.bench.transport.rows import Row, less_is_better, more_is_better

OUT = ROOT / "build" / "bench" / "split.json"
PAGE = ROOT / "build" / "bench" / "split.html"
QUIET_GOAL = 1.3
CHUNK = 256  # while nobody decodes
# Times the objective on gaps: how strict it must be for one or the other to win.
STRICTNESS = (0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class Found:
    """Seconds; ``itl_p99_s`` of the streams alone, ``goodput`` in requests/s over the seconds in which they were due, and
    what it would be with gaps bounded at each of ``STRICTNESS`` times the objective."""

    itl_p99_s: float
    itl_p50_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    goodput: float
    attained: float
    num_failed: int
    goodput_by_bound: tuple[float, ...]


class Loads(NamedTuple):
    """By round."""

    quiet: list[Found]
    mixed: list[Found]

    def of(self, quantity: str) -> tuple[list[float], list[float]]:
        return [getattr(f, quantity) for f in self.quiet], [getattr(f, quantity) for f in self.mixed]

    def medians(self, quantity: str) -> tuple[float, float]:
        quiet, mixed = self.of(quantity)
        return statistics.median(quiet), statistics.median(mixed)


def found_in(records: Sequence[Record], objectives: Slo, seconds: float) -> Found:
    """Raises RuntimeError where nothing was answered."""
    whole = [record for record in records if record.error is None]
    gaps = sorted(gap for record in whole if is_stream(record) for gap in record.gaps_s)
    ttfts = sorted(ttft for record in whole if (ttft := record.ttft_s) is not None)
    if not gaps or not ttfts:
        raise RuntimeError(f"no stream of {len(records)} requests was answered: {records[0].error if records else ''}")
    good = sum(map(objectives.is_met_by, whole))
    by_bound = [sum(map(stricter.is_met_by, whole)) / seconds for _, stricter in bounded(objectives)]
    return Found(
        percentile(gaps, 99), percentile(gaps, 50), percentile(ttfts, 50), percentile(ttfts, 99), good / seconds,
        good / len(records), len(records) - len(whole), tuple(by_bound),
    )  # fmt: skip


def bounded(objectives: Slo) -> list[tuple[float, Slo]]:
    """The objective on gaps in seconds, and the objectives with it; none where there is none on gaps."""
    if objectives.itl is None:
        return []
    return [(bound := objectives.itl * times, replace(objectives, itl=bound)) for times in STRICTNESS]


def main() -> None:
    options = parse()
    console, objectives = Console(), slo.parse(options.slo)
    base, bounds_s = Mix(options.streams, options.longs), options.slo_itl_s
    tried = {
        "split": [
            Fleet(f"split-{w:g}-{1e3 * s:g}ms", 1, 1, CHUNK, CHUNK // MIXED_SHARE, w, slo_itl_s=s)
            for w, s in product(options.weights, bounds_s)
        ],
        "colocated": [
            Fleet(f"colocated-{size}-{1e3 * s:g}ms", 0, 2, CHUNK, size, slo_itl_s=s)
            for size, s in product(options.chunks, bounds_s)
        ],
    }
    fleets = {
        name: tuned(console, base.scaled(options.tune_at), each, objectives, options) for name, each in tried.items()
    }
    found = {name: [Loads([], []) for _ in options.factors] for name in fleets}
    # In turn: a machine whose speed changes is the same for both.
    for seed, (name, fleet) in product(range(options.seed, options.seed + options.rounds), fleets.items()):
        with fleet.running() as address:
            for factor, loads in zip(options.factors, found[name], strict=True):
                for mix, into in ((base.scaled(factor).quiet(), loads.quiet), (base.scaled(factor), loads.mixed)):
                    records = measure(address, mix, options.warm, options.seconds, seed)
                    into.append(found_in(records, objectives, options.seconds))
                where = f"{name}, rate x{factor:g}"
                say(console, f"{where}: quiet {told(loads.quiet[-1])}; with long prompts {told(loads.mixed[-1])}")
    rows = rows_of(found, options.factors)
    console.print(figures(found, options.factors))
    if objectives.itl is not None:
        console.print(by_bound(found, options.factors, objectives))
    console.print(table(rows))
    write_json(rows, OUT)
    PAGE.write_text(page(found, options.factors, objectives))
    chosen = f"taken: {fleets['colocated'].name} and {fleets['split'].name}"
    say(console, f"{chosen}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    say(console, f"wrote {OUT.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")


def tuned(
    console: Console, mix: Mix, fleets: Sequence[Fleet], objectives: Slo, options: argparse.Namespace
) -> Fleet:  # fmt: skip
    """The one with which most requests are good; of equals the lower gaps."""
    tried: list[tuple[Found, Fleet]] = []
    for fleet in fleets:
        with fleet.running() as address:
            records = measure(address, mix, options.warm, options.seconds, options.seed)
        tried.append((found_in(records, objectives, options.seconds), fleet))
        say(console, f"{fleet.name}: {told(tried[-1][0])}")
    return max(tried, key=lambda pair: (pair[0].goodput, -pair[0].itl_p99_s))[1]


def told(found: Found) -> str:
    return (
        f"ITL p50 {1e3 * found.itl_p50_s:.0f}, p99 {1e3 * found.itl_p99_s:.0f} ms, TTFT p50 {found.ttft_p50_s:.2f}, "
        f"p99 {found.ttft_p99_s:.2f} s, good {found.goodput:.2f}/s ({found.attained:.0%}), failed {found.num_failed}"
    )


def rows_of(found: dict[str, list[Loads]], factors: Sequence[float]) -> list[Row]:
    rows = []
    for factor, split, colocated in zip(factors, found["split"], found["colocated"], strict=True):
        at = f"rate x{factor:g}"
        (quiet_itl, itl), (_, ttft) = split.of("itl_p99_s"), split.of("ttft_p99_s")
        (_, their_itl), (_, their_ttft) = colocated.of("itl_p99_s"), colocated.of("ttft_p99_s")
        good, their_good = split.of("goodput")[1], [max(g, 1e-3) for g in colocated.of("goodput")[1]]
        rows += [
            less_is_better(f"{at}: p99 ITL split / its quiet value", itl, quiet_itl, 1 / QUIET_GOAL, "s"),
            less_is_better(f"{at}: p99 ITL, split / colocated", itl, their_itl, 1.0, "s"),
            less_is_better(f"{at}: p99 TTFT, split / colocated", ttft, their_ttft, 1.0, "s"),
            more_is_better(f"{at}: goodput, split / colocated", good, their_good, 1.0, "requests/s"),
        ]
    return rows


def figures(found: dict[str, list[Loads]], factors: Sequence[float]) -> Table:
    drawn = Table("fleet", "rate", "quiet ITL p99 ms", "ITL p99 ms", "TTFT p50 s", "TTFT p99 s", "good/s", "good")
    for name, each in found.items():
        for factor, loads in zip(factors, each, strict=True):
            quiet, mixed = loads.medians("itl_p99_s")
            drawn.add_row(
                name, f"x{factor:g}", f"{1e3 * quiet:.0f}", f"{1e3 * mixed:.0f}",
                f"{loads.medians('ttft_p50_s')[1]:.2f}", f"{loads.medians('ttft_p99_s')[1]:.2f}",
                f"{loads.medians('goodput')[1]:.2f}", f"{loads.medians('attained')[1]:.0%}",
            )  # fmt: skip
    return drawn


def by_bound(found: dict[str, list[Loads]], factors: Sequence[float], objectives: Slo) -> Table:
    """Good requests/s, had the objective on gaps been another; of fleets that were tuned for the one that was."""
    drawn = Table("good/s, gaps within ms", "rate", *(f"{1e3 * bound:g}" for bound, _ in bounded(objectives)))
    for name, each in found.items():
        for factor, loads in zip(factors, each, strict=True):
            drawn.add_row(name, f"x{factor:g}", *(f"{good:.2f}" for good in medians_by_bound(loads)))
    return drawn


def medians_by_bound(loads: Loads) -> list[float]:
    return [statistics.median(goods) for goods in zip(*(found.goodput_by_bound for found in loads.mixed), strict=True)]


def page(found: dict[str, list[Loads]], factors: Sequence[float], objectives: Slo) -> str:
    def lines(quantity: str, scale: float = 1.0) -> list[Line]:
        return [
            Line(name, [(f, scale * loads.medians(quantity)[1]) for f, loads in zip(factors, each, strict=True)])
            for name, each in found.items()
        ]

    bounds_ms = [1e3 * bound for bound, _ in bounded(objectives)]
    by_bound_at = {
        f"rate x{factor:g}": [
            Line(name, list(zip(bounds_ms, medians_by_bound(each[number]), strict=True)))
            for name, each in found.items()
        ]
        for number, factor in enumerate(factors if bounds_ms else ())
    }
    plots = (
        plot(lines("itl_p99_s", 1e3), "rate, times the base", "p99 ITL of streams, ms"),
        plot(lines("ttft_p99_s"), "rate, times the base", "p99 TTFT, s"),
        plot(lines("goodput"), "rate, times the base", "good requests/s"),
        *(plot(drawn, "bound on gaps, ms", f"good requests/s, {at}") for at, drawn in by_bound_at.items()),
    )
    style = "body{font:14px system-ui;max-width:520px;margin:auto}svg{width:100%}.grid{stroke:#ddd}text{font-size:10px}"
    return f"<!doctype html><meta charset=utf-8><title>split or not</title><style>{style}</style>{''.join(plots)}\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-split", description=__doc__)
    parser.add_argument(
        "--streams", type=float, default=0.8, help="short prompts a second at rate 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--longs", type=float, default=0.15, help="long prompts a second at rate 1 (default: %(default)s)"
    )
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 1.5], help="rates, times these")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[8, 16, 32, 64], help="sizes to try when colocated, beside streams"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[5, 20], help="--stall-weight of the split fleet's gateway, to try"
    )
    parser.add_argument("--tune-at", type=float, default=1.0, help="the rate at which they are tried")
    parser.add_argument(
        "--slo-itl-s", type=float, nargs="+", default=[0.0],
        help="of the gateways, to try: how long a decode step may get by letting more in, in seconds; 0: as it comes",
    )  # fmt: skip
    parser.add_argument("--slo", default="ttft=5s,itl=100ms", help="what a good request keeps (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load that count")
    parser.add_argument("--warm", type=float, default=5.0, help="seconds before, that do not")
    parser.add_argument("--rounds", type=int, default=1, help="of each load, with the seeds from --seed on")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
