"""What an engine adds up of its steps says what they cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.phases import Piece
from services.engine.step_sums import NUM_SHARES, StepSums, shares_of

PIECES = st.lists(st.builds(lambda new, start: Piece(new, start + new, 1), st.integers(2, 300), st.integers(0, 900)))
DECODES = st.lists(st.builds(lambda context: Piece(1, context, 1), st.integers(1, 1000)))
EXPECTED = st.one_of(st.none(), st.floats(0.2, 5.0))  # of what it takes
STEPS = st.lists(st.tuples(PIECES, DECODES, st.floats(1e-4, 10.0), EXPECTED), min_size=1, max_size=8)


def test_a_step_is_counted_by_what_it_holds() -> None:
    prefill = [Piece(64, 64, 0), Piece(32, 160, 1)]
    decode = [Piece(1, 100, 1), Piece(1, 7, 1), Piece(1, 13, 1)]
    assert shares_of(prefill, decode) == (1, 96, 64 * 32 + 32 * (128 + 16), 3, 120)


@given(STEPS)
def test_the_sums_are_those_of_the_steps(steps: list[tuple[list[Piece], list[Piece], float, float | None]]) -> None:
    sums = StepSums()
    for prefill, decode, elapsed_s, early in steps:
        sums.observe(prefill, decode, elapsed_s, early and early * elapsed_s)
    shares = np.array([shares_of(prefill, decode) for prefill, decode, *_ in steps])
    times = np.array([elapsed_s for *_, elapsed_s, _ in steps])
    expected = times * [1 if early is None else early for *_, early in steps]
    ratios, weights = shares / expected[:, None], 1 + shares[:, 3]
    assert sums.seconds == pytest.approx(times.sum())
    assert sums.shares == pytest.approx(shares.sum(axis=0))
    assert sums.ratios == pytest.approx((ratios * (weights * times / expected)[:, None]).sum(axis=0))
    assert sums.squares == pytest.approx((weights * (times / expected) ** 2).sum())
    assert sums.products == pytest.approx((ratios.T @ (weights[:, None] * ratios))[np.triu_indices(NUM_SHARES)])
    assert sums.scatter == [0, 0, 0, 0]


def test_a_step_that_was_stopped_counts_for_no_more_than_ten_times() -> None:
    stopped, usual = StepSums(), StepSums()
    stopped.observe([], [Piece(1, 10, 1)], 5.0, 0.01)
    usual.observe([], [Piece(1, 10, 1)], 5.0, 0.5)
    assert (stopped.products, stopped.squares) == (usual.products, 2 * 100)


def test_how_far_decode_steps_were_from_what_was_expected() -> None:
    sums = StepSums()
    for taken_s in (0.010, 0.020, 0.005):
        sums.observe_decode(taken_s, 0.010)
    assert sums.scatter == pytest.approx([3, 0.035, 0, 2 * np.log(2) ** 2])
