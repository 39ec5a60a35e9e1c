"""What a load leaves open of its own figures."""

from __future__ import annotations

from dataclasses import astuple
from math import inf

from kvferry.bench import slo
from kvferry.bench.record import Record
from tests.bench.validate.resample import known_to

OBJECTIVES = slo.parse("ttft=1s,itl=50ms")


def record(at_s: float, gaps_s: list[float], ttft_s: float = 0.5) -> Record:
    token_at_s = [at_s + ttft_s]
    for gap_s in gaps_s:
        token_at_s.append(token_at_s[-1] + gap_s)
    return Record(at_s, at_s, token_at_s[-1], 10, tuple(token_at_s))


def test_a_load_that_is_always_the_same_leaves_nothing_open() -> None:
    same = [record(float(n), [0.004] * 10) for n in range(100)]
    assert max(astuple(known_to(same, OBJECTIVES))) < 1e-9


def test_a_percentile_between_two_heaps_of_gaps_is_left_open() -> None:
    """A tenth of the gaps is long, more in one half of the stretches and fewer in the other."""
    num_long = [8 if n // 10 % 2 else 12 for n in range(200)]
    load = [record(float(n), [0.004] * (100 - long) + [0.040] * long) for n, long in enumerate(num_long)]
    found = known_to(load, OBJECTIVES)
    assert found.itl_p50 < 1e-9
    assert found.itl_p90 > 0.5
    assert known_to(load, OBJECTIVES) == found, "the same every time"


def test_who_queues_together_is_drawn_together() -> None:
    """Every other stretch misses the objective as a whole: drawn one by one they would leave a tenth open."""
    load = [record(float(n), [0.004], 2.0 if n // 10 % 2 else 0.5) for n in range(200)]
    assert known_to(load, OBJECTIVES).good > 0.3


def test_what_is_never_kept_is_known() -> None:
    late = [record(float(n), [0.004], 2.0) for n in range(100)]
    assert known_to(late, OBJECTIVES).good == 0


def test_a_short_load_cannot_tell() -> None:
    short = [record(float(n), [0.004] * 10) for n in range(90)]
    assert set(astuple(known_to(short, OBJECTIVES))) == {inf}
