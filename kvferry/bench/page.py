"""A measurement as one HTML page that needs nothing else.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from kvferry.bench.plots import Line, plot
from kvferry.bench.record import Record, percentile
from kvferry.bench.slo import Slo
from kvferry.bench.statistics import Summary

MAX_BUCKETS = 60
_STYLE = """
body{font:16px/1.45 system-ui,sans-serif;margin:1rem auto;max-width:64rem;padding:0 .8rem;color:#111;background:#fff}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem}
figure{margin:0}svg{width:100%;height:auto}svg text{font-size:10px;fill:#555}.grid{stroke:#ddd}
.wide{overflow-x:auto}table{border-collapse:collapse}td,th{padding:.15rem .6rem;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}.warning{background:#fef3c7;padding:.4rem .6rem}
"""


def page(
    title: str, records: Sequence[Record], summary: Summary, slo: Slo, warnings: Sequence[str],
    trials: Sequence[tuple[float, Summary]] = (),
) -> str:  # fmt: skip
    """``trials``: offered rate and outcome of each, of a search, of which ``records`` and ``summary`` are one."""
    plots = [
        plot(_shares({"first token": [r.ttft_s for r in records], "end to end": [r.e2e_s for r in records]}),
             "seconds", "Share of requests that had it by then"),
        plot(_shares({"ITL": [gap for r in records for gap in r.gaps_s], "TPOT": [r.tpot_s for r in records]}, 1e3),
             "milliseconds", "Share of gaps between tokens (ITL), and of requests (TPOT)"),
        *_over_time(records, slo),
    ]  # fmt: skip
    if trials:
        ordered = sorted(trials, key=lambda trial: trial[0])
        goodput = Line("goodput", [(rate, found.goodput_per_s) for rate, found in ordered])
        answered = Line("answered", [(rate, found.requests_per_s) for rate, found in ordered])
        plots.insert(0, plot([goodput, answered], "requests/s offered", "Requests/s"))
    told = "".join(f'<p class="warning">{escape(line)}</p>' for line in warnings)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>{told}{_words(summary, slo)}"
        f'{_table(summary)}<div class="plots">{"".join(plots)}</div></html>\n'
    )


def _words(summary: Summary, slo: Slo) -> str:
    lines = [
        f"{summary.num_completed} of {summary.num_requests} requests answered in {summary.seconds:.1f} s: "
        f"{summary.requests_per_s:.3g} requests/s, {summary.output_tokens_per_s:.4g} tokens/s, at most "
        f"{summary.max_open} streams open."
    ]
    if slo != Slo():
        lines.append(f"Goodput {summary.goodput_per_s:.3g} requests/s; {summary.attained:.1%} of requests met the SLO.")
    if summary.errors:
        lines.append("Failed: " + ", ".join(f"{count} {reason}" for reason, count in sorted(summary.errors.items())))
    if summary.num_cut:
        lines.append(f"{summary.num_cut} requests were longer than the model's context, and were cut to it.")
    lines.append("Latencies count from when a request was due.")
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _table(summary: Summary) -> str:
    rows = []
    for name, spread in (
        ("first token", summary.ttft), ("second token", summary.second_token), ("between tokens (ITL)", summary.itl),
        ("per output token (TPOT)", summary.tpot), ("end to end", summary.e2e), ("late to send", summary.send_lag),
    ):  # fmt: skip
        if spread is not None:
            values = (spread.p50, spread.p90, spread.p99, spread.mean, spread.max)
            rows.append(f"<tr><td>{name}" + "".join(f"<td>{value * 1e3:.1f}" for value in values))
    return (
        '<div class="wide"><table><tr><th>milliseconds<th>p50<th>p90<th>p99<th>mean<th>max'
        f"{''.join(rows)}</table></div>"
    )


def _shares(values: Mapping[str, Iterable[float | None]], scale: float = 1.0) -> list[Line]:
    lines = []
    for name, each in values.items():
        if ordered := sorted(value for value in each if value is not None):
            count = len(ordered)
            lines.append(Line(name, [(value * scale, (n + 1) / count) for n, value in enumerate(ordered)]))
    return lines


def _over_time(records: Sequence[Record], slo: Slo) -> list[str]:
    if not records:
        return []
    end_s = max(record.end_s for record in records)
    bucket_s = max(1.0, end_s / MAX_BUCKETS)

    def by_time(
        times: Iterable[tuple[float, float]], value: Callable[[list[float]], float]
    ) -> list[tuple[float, float]]:
        found: dict[int, list[float]] = {}
        for at_s, measured in times:
            found.setdefault(int(at_s / bucket_s), []).append(measured)
        return [(bucket * bucket_s, value(each)) for bucket, each in sorted(found.items())]

    def per_second(name: str, times: Iterable[float]) -> list[Line]:
        counted = dict(by_time(((at_s, 1.0) for at_s in times), lambda each: len(each) / bucket_s))
        every = [bucket * bucket_s for bucket in range(int(end_s / bucket_s) + 1)]
        return [Line(name, [(at_s, counted.get(at_s, 0.0)) for at_s in every])] if counted else []

    ttfts = [(record.scheduled_s, record.ttft_s) for record in records if record.ttft_s is not None]
    latency = [
        Line(f"p{rank}", by_time(ttfts, lambda each, rank=rank: percentile(sorted(each), rank)))  # type: ignore[misc]
        for rank in (50, 99)
        if ttfts
    ]
    whole = [record for record in records if record.error is None]
    answered = per_second("answered", (record.end_s for record in whole))
    good = per_second("goodput", (record.end_s for record in whole if slo.is_met_by(record)))
    due = per_second("due", (record.scheduled_s for record in records))
    tokens = per_second("tokens", (at_s for record in records for at_s in record.token_at_s))
    return [
        plot(latency, "seconds since the start, of the due send", "Seconds to the first token"),
        plot([*due, *answered, *(good if slo != Slo() else ())], "seconds since the start", "Requests/s"),
        plot(tokens, "seconds since the start", "Tokens/s"),
    ]
