"""Quantiles of the histogram of gaps between steps, from what a worker publishes."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Sequence
from itertools import pairwise

from services.engine.gaps import BOUNDS_S

_BUCKET = re.compile(r'kvferry_engine_step_gap_seconds_bucket\{le="[^"]+"\} ([\d.e+]+)')


def scrape(metrics_url: str) -> list[int]:
    """Counts by bucket, as ``Gaps.counts``."""
    with urllib.request.urlopen(metrics_url, timeout=10) as response:
        return parse(response.read().decode())


def parse(text: str) -> list[int]:
    cumulative = [0, *(int(float(count)) for count in _BUCKET.findall(text))]
    return [b - a for a, b in pairwise(cumulative)]


def quantile(counts: Sequence[int], share: float) -> float:
    """Seconds: linear within the bucket that holds it, as Prometheus has it; the last bound for what is above all."""
    if not sum(counts):
        raise ValueError("no gap was observed")
    rank = share * sum(counts)
    below = 0
    for count, low, high in zip(counts, (0.0, *BOUNDS_S), (*BOUNDS_S, BOUNDS_S[-1]), strict=True):
        if count and below + count >= rank:
            return low + (high - low) * (rank - below) / count
        below += count
    return BOUNDS_S[-1]
