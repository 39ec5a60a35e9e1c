"""What workers computed between two looks, whoever came or went meanwhile."""

from __future__ import annotations

from kvferry._convert import _step_sums
from kvferry.api.directory.v1 import directory_pb2
from kvferry.cli.step_sums import between
from kvferry.types import StepSums


def sums(num_steps: float) -> StepSums:
    each = (num_steps,) * 5, (num_steps * 2,) * 5, (num_steps * 3,) * 15, (num_steps * 4,) * 4
    return StepSums(num_steps / 10, *each, num_steps * 5)


def test_workers_of_before_weighed_steps_by_what_they_took() -> None:
    told = directory_pb2.StepSums(seconds=1, shares=[7] * 5, ratios=[1] * 5, products=[1] * 15)
    assert _step_sums(told).squares == 7
    told.squares = 9
    assert _step_sums(told).squares == 9
    assert _step_sums(directory_pb2.StepSums()).squares == 0


def test_what_was_before_does_not_count() -> None:
    before = {("prefill-0", 1): sums(10), ("decode-0", 2): sums(100)}
    after = {("prefill-0", 1): sums(15), ("decode-0", 2): sums(120)}
    assert between(before, after) == StepSums(2.5, (25,) * 5, (50,) * 5, (75,) * 15, (100,) * 4, 125)


def test_a_successor_counts_from_its_start_and_who_is_gone_does_not() -> None:
    before = {("decode-0", 2): sums(100), ("decode-1", 7): sums(5)}
    assert between(before, {("decode-0", 3): sums(4)}) == sums(4)


def test_since_the_start() -> None:
    assert between({}, {("decode-0", 3): sums(4)}) == sums(4)


def test_nobody_computed_a_step() -> None:
    idle = StepSums(0.0, (), (), ())  # as it is read from a worker of before, or one that has just started
    assert between({}, {}) is None
    assert between({}, {("decode-0", 3): idle}) is None
    assert between({("decode-0", 3): sums(4)}, {("decode-0", 3): sums(4)}) is None
    assert between({("decode-0", 3): idle}, {("decode-0", 3): sums(4)}) == sums(4)
