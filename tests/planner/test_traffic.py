"""Traces as arrays: what is cached, and changes that leave the rest as it is."""

from __future__ import annotations

import numpy as np
import pytest

from kvferry.bench.workload import Ask
from services.planner.traffic import Traffic, traffic_of


def test_prefixes_that_came_before_are_cached() -> None:
    asks = [Ask(5.0, 1100, 10, (1, 2, 3)), Ask(6.0, 1024, 10, (1, 2)), Ask(7.0, 1600, 10, (1, 9, 2)), Ask(8.0, 700, 1)]
    found = traffic_of(asks, 1e9)
    assert found.num_cached.tolist() == [0, 1023, 512, 0]
    assert found.arrive_s.tolist() == [0, 1, 2, 3]


def test_a_small_cache_forgets_what_was_used_longest_ago() -> None:
    asks = [Ask(0.0, 600, 1, (1,)), Ask(1.0, 600, 1, (2,)), Ask(2.0, 600, 1, (1,)), Ask(3.0, 600, 1, (3,)),
            Ask(4.0, 600, 1, (2,)), Ask(5.0, 600, 1, (1,))]  # fmt: skip
    assert traffic_of(asks, 2 * 512).num_cached.tolist() == [0, 0, 512, 0, 0, 0]
    assert traffic_of(asks, 3 * 512).num_cached.tolist() == [0, 0, 512, 0, 512, 512]


def some(count: int = 300) -> Traffic:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 1000, count).astype(np.int32)
    return Traffic(np.sort(random.random(count) * 600), lengths, lengths + 1, lengths // 2)


def test_a_seed_moves_requests_within_their_minute_only() -> None:
    whole, moved = some(), some().shuffled(3)
    assert (moved.arrive_s == whole.arrive_s).all()
    assert (moved.num_input != whole.num_input).any()
    assert (moved.num_output == moved.num_input + 1).all()
    for minute in range(10):
        here = (whole.arrive_s >= 60 * minute) & (whole.arrive_s < 60 * (minute + 1))
        assert sorted(moved.num_input[here]) == sorted(whole.num_input[here])
    assert (some().shuffled(3).num_input == moved.num_input).all()


def test_a_rate_replaces_the_times() -> None:
    made = some(5000).poisson(4.0, 1, 5000)
    assert made.rate == pytest.approx(4.0, rel=0.05)
    assert sorted(made.num_input) == sorted(some(5000).num_input)


def test_at_a_rate_a_short_trace_is_repeated() -> None:
    made = some(300).poisson(4.0, 1, 1000)
    assert len(made) == 1000
    assert made.rate == pytest.approx(4.0, rel=0.1)
    assert sorted(made.num_input[:900]) == sorted(np.tile(some(300).num_input, 3))


def test_one_of_several_fleets_has_all_requests_at_its_rate() -> None:
    """Three to which they go in turn: a third of them in each, one after the other."""
    whole = some(600)
    made = whole.in_turn(3)
    assert made.rate == pytest.approx(whole.rate / 3, rel=0.02)
    assert sorted(made.num_input) == sorted(whole.num_input)
    assert (np.diff(made.arrive_s) >= 0).all()
    assert (made.num_input[200:400] == whole.num_input[1::3]).all()
    assert made.arrive_s[200:400] == pytest.approx(whole.arrive_s[1::3] + whole.duration_s)
    assert (made.num_cached == made.num_input // 2).all()
    assert (whole.in_turn(1).arrive_s == whole.arrive_s).all()


def test_hits_rise_and_the_last_token_is_still_computed() -> None:
    more = some().with_more_hits(1.0)
    assert (more.num_cached == more.num_input - 1).all()
    assert some().with_more_hits(0.5).hit_rate == pytest.approx(0.75, abs=0.01)


def test_the_busiest_stretch_is_the_one_with_most_tokens_a_second() -> None:
    quiet = np.arange(50) * 10.0
    busy = 500 + np.arange(20) * 1.0
    later = 600 + np.arange(50) * 10.0
    at = np.concatenate([quiet, busy, later])
    lengths = np.full(120, 10, np.int32)
    found = Traffic(at, lengths, lengths, lengths * 0).busiest(20)
    assert len(found) == 20
    assert found.arrive_s[0] == 0
    assert found.duration_s == pytest.approx(20.0)
