"""What kvferry bench has measured: on the terminal, and as the values of a JSON document."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kvferry.bench.load import Load
from kvferry.bench.page import page
from kvferry.bench.record import Record
from kvferry.bench.runner import INTERRUPTED, Outcome
from kvferry.bench.slo import Slo
from kvferry.bench.statistics import Spread, Summary, summarize
from kvferry.cli import output

BUSY_CORES, LATE_S = 0.9, 0.05


def summary_of(outcome: Outcome, load: Load, wanted: Slo) -> Summary:
    return summarize(measured(outcome, load), wanted)


def measured(outcome: Outcome, load: Load) -> list[Record]:
    """Without those of the warm-up, and those that Ctrl-C ended."""
    return [r for r in outcome.records if r.scheduled_s >= load.warmup_s and r.error != INTERRUPTED]


def told(load: Load) -> str:
    if load.closed:
        return "closed loop"
    return "trace" if load.rate is None else f"{load.rate:.3g} requests/s offered"


def latencies(summary: Summary) -> list[tuple[str, Spread | None]]:
    return [
        ("time to first token", summary.ttft),
        ("time to second token", summary.second_token),
        ("between tokens (ITL)", summary.itl),
        ("per output token (TPOT)", summary.tpot),
        ("end to end", summary.e2e),
    ]


def show(outcome: Outcome, summary: Summary, load: Load, wanted: Slo) -> None:
    rows = [
        (name, *("" if value is None else f"{value * 1e3:.1f}" for value in _values(spread)))
        for name, spread in latencies(summary)
    ]
    output.show_table(
        f"{told(load)}: {summary.num_completed} of {summary.num_requests} answered, milliseconds",
        ("", "p50", "p90", "p99", "mean", "max"), rows, frozenset(range(1, 6)),
    )  # fmt: skip
    print(
        f"{summary.requests_per_s:.3g} requests/s, {summary.output_tokens_per_s:.4g} tokens/s, "
        f"at most {summary.max_open} streams open, in {summary.seconds:.1f} s"
    )
    if wanted != Slo():
        print(f"goodput {summary.goodput_per_s:.3g} requests/s; {summary.attained:.1%} of requests met the SLO")
    if summary.errors:
        print("failed: " + ", ".join(f"{count} {reason}" for reason, count in sorted(summary.errors.items())))
        for reason, said in sorted(summary.said.items()):
            if said:
                print(f"  the first {reason}: {said}")
    if summary.num_cut:
        print(f"{summary.num_cut} requests were longer than the model's context, and were cut to it")
    output.say(
        f"kvferry bench used {outcome.cores:.2f} cores; its event loop was at most {outcome.loop_lag_s * 1e3:.0f} ms late"
    )
    for line in bottleneck(outcome, summary, load.concurrency):
        output.say(line)


def bottleneck(outcome: Outcome, summary: Summary, concurrency: int | None) -> list[str]:
    """Why the figures may be this process's own, rather than the system's."""
    found = []
    if outcome.cores >= BUSY_CORES:
        found.append(f"this process used {outcome.cores:.2f} cores")
    if outcome.loop_lag_s >= LATE_S:
        found.append(f"its event loop was up to {outcome.loop_lag_s * 1e3:.0f} ms late")
    # Sends that had to wait for --concurrency are late by the system's doing.
    lag = summary.send_lag
    if lag is not None and lag.p99 >= LATE_S and concurrency is None:
        found.append(f"1 % of sends were {lag.p99 * 1e3:.0f} ms late or more")
    return [f"kvferry bench may itself be the bottleneck: {reason}" for reason in found]


def html(
    outcome: Outcome, summary: Summary, load: Load, wanted: Slo, trials: Sequence[tuple[float, Summary]] = ()
) -> str:
    warnings = bottleneck(outcome, summary, load.concurrency)
    return page(f"kvferry bench: {told(load)}", measured(outcome, load), summary, wanted, warnings, trials)


def content(summary: Summary, outcome: Outcome, load: Load) -> dict[str, Any]:
    """Seconds."""
    return {**dataclasses.asdict(summary), "cores": outcome.cores, "loop_lag_s": outcome.loop_lag_s,
            "interrupted": outcome.interrupted, "bottleneck": bottleneck(outcome, summary, load.concurrency)}  # fmt: skip


def _values(spread: Spread | None) -> tuple[float | None, ...]:
    return (None,) * 5 if spread is None else (spread.p50, spread.p90, spread.p99, spread.mean, spread.max)
