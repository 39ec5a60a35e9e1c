"""The system bench's own parts: equal seeds give equal work, and quantiles are read from what a worker publishes."""

from __future__ import annotations

import pytest

from services.engine.gaps import BOUNDS_S, Gaps
from tests.bench.system.gaps import parse, quantile
from tests.bench.system.mix import mix


def test_a_seed_says_all_of_a_mix() -> None:
    assert mix(32, 1) == mix(32, 1)
    assert {ask.prompt for ask in mix(32, 1)}.isdisjoint(ask.prompt for ask in mix(32, 2))
    assert len({len(ask.prompt) for ask in mix(32, 1)}) > 16
    assert {ask.temperature for ask in mix(32, 1)} == {0, 0.8}


def test_a_gap_falls_into_the_bucket_whose_bound_it_keeps() -> None:
    gaps = Gaps()
    for seconds in (0.0001, 0.00011, 0.001, 7.0):
        gaps.observe(seconds)
    assert gaps.counts == [1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert gaps.total_s == pytest.approx(7.00121)


def test_a_quantile_lies_within_its_bucket() -> None:
    counts = [0] * (len(BOUNDS_S) + 1)
    counts[0], counts[3] = 98, 2
    assert quantile(counts, 0.49) == pytest.approx(0.00005)
    assert quantile(counts, 0.99) == pytest.approx(0.00075)
    assert quantile(counts, 1.0) == pytest.approx(0.001)
    with pytest.raises(ValueError, match="no gap"):
        quantile([0] * len(counts), 0.5)


def test_what_lies_above_all_bounds_is_not_made_less_of_than_the_last() -> None:
    assert quantile([0] * len(BOUNDS_S) + [1], 0.99) == BOUNDS_S[-1]


def test_other_metrics_are_not_taken_for_gaps() -> None:
    text = (
        'kvferry_engine_step_gap_seconds_bucket{le="0.1"} 3.0\nkvferry_steps_total 9.0\n'
        'kvferry_engine_step_gap_seconds_bucket{le="+Inf"} 5.0\nkvferry_engine_step_gap_seconds_sum 1.5\n'
    )
    assert parse(text) == [3, 2]
