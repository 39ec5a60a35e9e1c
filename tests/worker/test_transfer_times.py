"""What a worker says of the speed of its transfers."""

from __future__ import annotations

import pytest

from services.worker.transfer_times import TransferTimes


def test_nothing_before_the_first() -> None:
    times = TransferTimes()
    assert (times.bytes_per_s, times.round_trip_s) == (0.0, 0.0)
    times.wrote(0, 0.0)
    assert times.bytes_per_s == 0.0


def test_bytes_count_by_their_time_and_newer_ones_more() -> None:
    times = TransferTimes()
    times.wrote(3000, 1.0)
    times.wrote(1000, 1.0)
    assert times.bytes_per_s == pytest.approx(2000, rel=0.01)
    for _ in range(1000):
        times.wrote(500, 1.0)
        times.answered(0.004)
    assert times.bytes_per_s == pytest.approx(500, rel=0.01)
    assert times.round_trip_s == pytest.approx(0.004)
