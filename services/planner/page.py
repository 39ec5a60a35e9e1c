"""A report as one HTML page that needs nothing from elsewhere.  Pure but for the reading of its template."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from services.planner import plots
from services.planner.report import Interval, Option, Percentiles, Report


def render(report: Report) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(interval=_interval, ms=_ms, seconds=_seconds, percent=_percent)
    options = [outcome.option for outcome in report.outcomes if outcome.option is not None]
    least = min((option.share for option in options), default=0.0)
    shown = [option for option in options if option.share == least]
    template = environment.get_template("report.html.j2")
    return template.render(
        report=report, shares=sorted({outcome.share for outcome in report.outcomes}), cost=_cost(options),
        ratio=_ratio(report), roofline=_roofline(report), first=_distribution(shown, "ttft"),
        gaps=_distribution(shown, "tpot"),
    )  # fmt: skip


def _cost(options: list[Option]) -> Markup:
    return plots.bars(
        [(f"{_short(option)}, {option.share:.0%}", option.usd_per_mtok.mean) for option in options],
        "$ per million tokens", "$",
    )  # fmt: skip


def _ratio(report: Report) -> Markup:
    named = [
        ("prefill", [(w.begin_s / 60, w.prefill_s) for w in report.windows]),
        ("decode", [(w.begin_s / 60, w.decode_s) for w in report.windows]),
    ]
    return plots.lines(named, "minutes", "worker seconds")


def _roofline(report: Report) -> Markup | None:
    roof = report.roofline
    if roof is None:
        return None
    marks = [(name, x, min(roof.flops_per_s, x * roof.bytes_per_s) / 1e12) for name, x in roof.points]
    low, high = min(x for _, x, _ in marks), max(*(x for _, x, _ in marks), 2 * roof.ridge)
    line = [(x, min(roof.flops_per_s, x * roof.bytes_per_s) / 1e12) for x in (low / 2, roof.ridge, high)]
    return plots.lines(
        [(f"{roof.worker}, as far as its peaks are reached", line)], "FLOP/byte", "TFLOP/s", log_x=True, log_y=True,
        marks=marks,
    )  # fmt: skip


def _distribution(options: list[Option], what: str) -> Markup | None:
    if not options:
        return None
    factor, unit = (1.0, "s") if what == "ttft" else (1e3, "ms")
    named = [
        (
            option.kind,
            # The last percent stretches the axis until nothing else is seen.
            [(value * factor, rank) for rank, value in enumerate(getattr(option, f"{what}_curve")[:100]) if value > 0],
        )
        for option in options
    ]
    return plots.lines(named, f"{what.upper()}, {unit}", "% of requests", log_x=True)


def _short(option: Option) -> str:
    return option.kind.replace(", ", " ").replace(" hardware", "")


def _interval(value: Interval) -> str:
    return f"{value.mean:.3g}" + (f" ± {value.half:.2g}" if value.half else "")


def _ms(value: Percentiles) -> str:
    return " / ".join(f"{each.mean * 1e3:.3g}" for each in (value.p50, value.p90, value.p99))


def _seconds(value: Percentiles) -> str:
    return " / ".join(f"{each.mean:.3g}" for each in (value.p50, value.p90, value.p99))


def _percent(value: Interval) -> str:
    return f"{100 * value.mean:.1f}" + (f" ± {100 * value.half:.1f}" if value.half else "") + " %"
