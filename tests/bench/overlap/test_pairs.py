"""The arithmetic of the paired figures."""

from __future__ import annotations

import pytest

from tests.bench.overlap.pairs import Pair, interval, rows


def test_ratios_are_taken_within_pairs() -> None:
    """A machine that was ten times slower for one pair does not move the median."""
    pairs = [Pair(s * 1.02, s, 0.9 * s, 0.004, 0.006, 0.875) for s in (1.0, 10.0, 1.0)]
    ttft, handover = rows(pairs, 2048)
    assert ttft["ratio"] == pytest.approx(1.02)
    assert (ttft["ours"], ttft["peer"], ttft["goal"]) == (pytest.approx(1.02), 1.0, 1.03)
    # 2 % of 0.9 s is more than 5 ms.
    assert handover["ratio"] == pytest.approx(6 / 18)
    assert (handover["ours"], handover["peer"], handover["unit"]) == (pytest.approx(6), pytest.approx(18), "ms")


def test_a_short_prefill_allows_5_ms() -> None:
    assert Pair(0.1, 0.1, 0.1, 0.0, 0.0, 1.0).allowed_s == 0.005


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (5, 1), (6, 1), (9, 2), (15, 4), (25, 8)])
def test_the_interval_is_that_of_the_sign_test(n: int, rank: int) -> None:
    """Ranks as tabulated for 95 % (for example Conover, Practical Nonparametric Statistics)."""
    assert interval([float(i) for i in range(n, 0, -1)]) == (rank, n + 1 - rank)
