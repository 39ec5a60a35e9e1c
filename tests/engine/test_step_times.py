"""The line through measured decode steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.step_times import StepTimes


def observed(*steps: tuple[int, float]) -> StepTimes:
    times = StepTimes()
    for step in steps:
        times.observe(*step)
    return times


def test_a_line_is_found_again() -> None:
    base, slope = observed(*((n, 0.02 + 0.003 * n) for n in (1, 4, 2, 8, 16) * 5)).line()
    assert base == pytest.approx(0.02)
    assert slope == pytest.approx(0.003)


def test_one_batch_size_is_all_base() -> None:
    assert StepTimes().line() == (0.0, 0.0)
    assert observed(*[(3, 0.05)] * 1000).line() == pytest.approx((0.05, 0.0))


def test_a_worker_that_became_slower_says_so() -> None:
    times = observed(*((n, 0.01 + 0.001 * n) for n in (1, 2) * 200))
    for n in (1, 2) * 1000:
        times.observe(n, 0.05 + 0.002 * n)
    assert times.line() == pytest.approx((0.05, 0.002), rel=0.02)


def test_what_the_next_step_takes_is_expected_once_there_were_some() -> None:
    times = observed(*((n, 0.02 + 0.003 * n) for n in (1, 4, 2, 8, 16) * 4))
    assert times.expected_s(5) is None
    times.observe(1, 0.023)
    assert times.expected_s(5) == pytest.approx(0.035)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 10)), min_size=1))
def test_neither_number_is_negative(steps: list[tuple[int, float]]) -> None:
    base, slope = observed(*steps).line()
    assert base >= 0
    assert slope >= 0
    assert base + slope > 0
