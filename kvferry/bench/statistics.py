"""What many records say together.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvferry.bench.record import Record, percentile
from kvferry.bench.slo import Slo


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds."""

    p50: float
    p90: float
    p99: float
    mean: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """``seconds`` runs from the first scheduled send to the last end.  ``said`` is what the first failure of each kind
    said.  Latencies are those of whole answers and count from the scheduled send; a spread is None where nothing was
    measured.  Rates are per second; ``attained`` is the share of all requests, failed ones included, that met the
    objectives."""

    seconds: float
    num_requests: int
    num_completed: int
    num_refused: int
    num_cut: int
    errors: Mapping[str, int]
    said: Mapping[str, str]
    ttft: Spread | None
    second_token: Spread | None
    itl: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    send_lag: Spread | None
    requests_per_s: float
    output_tokens_per_s: float
    goodput_per_s: float
    attained: float
    max_open: int


def summarize(records: Sequence[Record], slo: Slo) -> Summary:
    completed = [record for record in records if record.error is None]
    good = sum(map(slo.is_met_by, completed))
    seconds = max((r.end_s for r in records), default=0.0) - min((r.scheduled_s for r in records), default=0.0)

    def rate(count: int) -> float:
        return count / seconds if seconds > 0 else 0.0

    return Summary(
        seconds=seconds,
        num_requests=len(records),
        num_completed=len(completed),
        num_refused=sum(record.refused for record in records),
        num_cut=sum(record.cut for record in records),
        errors=dict(Counter(record.error for record in records if record.error is not None)),
        said={record.error: record.said for record in reversed(records) if record.error is not None},
        ttft=_spread(record.ttft_s for record in completed),
        second_token=_spread(record.second_token_s for record in completed),
        itl=_spread(gap for record in completed for gap in record.gaps_s),
        tpot=_spread(record.tpot_s for record in completed),
        e2e=_spread(record.e2e_s for record in completed),
        send_lag=_spread(record.sent_s - record.scheduled_s for record in records),
        requests_per_s=rate(len(completed)),
        output_tokens_per_s=rate(sum(len(record.token_at_s) for record in records)),
        goodput_per_s=rate(good),
        attained=good / len(records) if records else 0.0,
        max_open=_max_open(records),
    )


def _spread(values: Iterable[float | None]) -> Spread | None:
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    p50, p90, p99 = (percentile(ordered, rank) for rank in (50, 90, 99))
    return Spread(p50, p90, p99, sum(ordered) / len(ordered), ordered[-1])


def _max_open(records: Iterable[Record]) -> int:
    """Most requests that were under way at once."""
    changes = sorted(change for r in records for change in ((r.sent_s, 1), (r.end_s, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
