"""What a plan says.  Plain values, so that a JSON document is made of them as they are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's, two-sided, 95 %, by the number of values.
_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
MOST_SEEDS = max(_T_95)


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean over the seeds, and half of its 95 % interval; 0 of a single one."""

    mean: float
    half: float


def interval(values: Sequence[float]) -> Interval:
    if len(values) == 1:
        return Interval(values[0], 0.0)
    return Interval(statistics.fmean(values), _T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds."""

    p50: Interval
    p90: Interval
    p99: Interval


@dataclass(frozen=True, slots=True)
class Option:
    """The cheapest fleet of a kind with which ``share`` of the requests keep the objectives under each seed.

    ``prefill`` and ``decode`` name a worker: ranks and device; ``prefill`` is None of a colocated fleet.
    ``step_tokens``: of prompts in a step, ``mixed_tokens``: while others decode there.  ``patience``: of the
    gateway's line; 0 is the order of arrival.  ``instances``: whole ones that are rented, of each name;
    dollars are theirs, and ``num_devices`` those that workers use.  ``usd_per_mtok``: for a million tokens,
    prompts and answers together, of a fleet as large as each seed by itself needs it; the other figures are those
    of the fleet that does for all.  ``first_token`` counts from the arrival, and so does ``second_token``, which
    holds the handover.  ``itl`` is of all gaps between tokens, ``tpot`` of each request's mean.  Busy: share of the
    time in which workers compute.  Goodput: requests that keep the objectives, each second, each second and device,
    and for each dollar.  ``ttft_curve`` and ``tpot_curve``: seconds at each percent of requests, 0 to 100."""

    kind: str
    share: float
    prefill: str | None
    decode: str
    num_prefill: int
    num_decode: int
    step_tokens: int
    mixed_tokens: int
    patience: float
    num_devices: int
    instances: dict[str, int]
    usd_per_hour: float
    usd_per_mtok: Interval
    attained: Interval
    first_token: Percentiles
    second_token: Percentiles
    itl: Percentiles
    tpot: Percentiles
    e2e: Percentiles
    prefill_busy: Interval
    decode_busy: Interval
    goodput_per_s: Interval
    goodput_per_device: Interval
    goodput_per_usd: Interval
    usd_per_hour_by_seed: tuple[float, ...]
    ttft_curve: tuple[float, ...]
    tpot_curve: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one kind for one share; ``option`` None: none was found."""

    kind: str
    share: float
    option: Option | None


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """If something were otherwise: dollars an hour of the cheapest fleet of each kind, by its name; seed 0, the lower
    share.  All is searched anew."""

    what: str
    usd_per_hour: dict[str, float | None]
    split_saves: float | None


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of the trace: tokens, and the seconds that they would take on the reference worker."""

    begin_s: float
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """Of the reference worker, as far as its peaks are reached: FLOP/s, bytes/s, and where steps lie, in FLOP/byte."""

    worker: str
    flops_per_s: float
    bytes_per_s: float
    points: tuple[tuple[str, float], ...]

    @property
    def ridge(self) -> float:
        return self.flops_per_s / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Load:
    """What was planned for.  ``num_cells``: the fleet is that many equal ones, each with its share of the requests."""

    trace: str
    num_requests: int
    planned_requests: int
    planned_s: float
    requests_per_s: float
    mean_prompt_tokens: float
    mean_answer_tokens: float
    hit_rate: float
    num_cells: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """``split_saves``: share of the colocated fleet's dollars, over the seeds; None where one of the two is missing.
    ``price``: what splitting does to the first and the second token."""

    split: bool
    headline: str
    reason: str
    price: str
    split_saves: Interval | None


@dataclass(frozen=True, slots=True)
class Report:
    """``verdict``: for the lower share of the requests, ``strict_verdict``: for the higher."""

    model: str
    dtype: str
    slo: dict[str, float]
    load: Load
    verdict: Verdict
    strict_verdict: Verdict
    outcomes: tuple[Outcome, ...]
    sensitivity: tuple[Sensitivity, ...]
    windows: tuple[Window, ...]
    roofline: Roofline | None
    assumptions: tuple[tuple[str, str], ...]
    num_seeds: int
    num_simulated: int
