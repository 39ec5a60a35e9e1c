"""What a worker says of the speed of its transfers."""

from __future__ import annotations

import pytest

from services.runtime.place import NOWHERE, Distance, Place, distance_between
from services.worker.transfer_times import TransferTimes

NEAR, FAR = Distance.HOST, Distance.FARTHER


def test_nothing_before_the_first() -> None:
    times = TransferTimes()
    assert (times.bytes_per_s, times.round_trip_s) == (0.0, 0.0)
    times.wrote(0, 0.0, NEAR)
    assert times.bytes_per_s == 0.0
    assert list(times.by_distance()) == []


def test_bytes_count_by_their_time_and_newer_ones_more() -> None:
    times = TransferTimes()
    times.wrote(3000, 1.0, NEAR)
    times.wrote(1000, 1.0, NEAR)
    assert times.bytes_per_s == pytest.approx(2000, rel=0.01)
    for _ in range(1000):
        times.wrote(500, 1.0, NEAR)
        times.answered(0.004, NEAR)
    assert times.bytes_per_s == pytest.approx(500, rel=0.01)
    assert times.round_trip_s == pytest.approx(0.004)


def test_each_distance_counts_for_itself_and_in_the_whole() -> None:
    times = TransferTimes()
    times.wrote(9000, 1.0, NEAR)
    times.wrote(1000, 1.0, FAR)
    times.answered(0.01, FAR)
    assert list(times.by_distance()) == [(NEAR, 9000.0, 0.0), (FAR, 1000.0, 0.01)]
    assert times.bytes_per_s == pytest.approx(5000, rel=0.02)


@pytest.mark.parametrize(
    ("there", "distance"),
    [
        (Place("h1", "r1", "a"), Distance.HOST),
        (Place("h2", "r1", "a"), Distance.RACK),
        (Place("h2", "r2", "a"), Distance.ZONE),
        (Place("h2", "r1", "b"), Distance.FARTHER),
        (Place("h1", "r1", "b"), Distance.FARTHER),  # another host of that name
        (Place("h1", "r2", "a"), Distance.ZONE),
        (Place("h1"), Distance.HOST),
        (Place("h2", "r1"), Distance.RACK),
        (Place("h2", zone="a"), Distance.ZONE),
        (Place(), Distance.FARTHER),
    ],
)
def test_how_far_it_is(there: Place, distance: Distance) -> None:
    here = Place("h1", "r1", "a")
    assert distance_between(here, there) is distance_between(there, here) is distance
    assert distance_between(NOWHERE, NOWHERE) is Distance.FARTHER


def test_a_place_is_what_its_labels_say() -> None:
    assert Place.of({"host": "h", "zone": "a", "colour": "red"}) == Place("h", "", "a")
