"""How much was in time, from what gateways count in buckets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from services.planner.online.attainment import Attainment, AttainmentBook, Reading
from services.planner.online.gateways import parse

BOUNDS = (0.1, 1.0, 10.0)


def reading(ttfts: list[float], itls: list[float]) -> Reading:
    """Through a gateway's own metrics and their text."""
    registry = CollectorRegistry()
    for name, values in (("kvferry_ttft_seconds", ttfts), ("kvferry_itl_seconds", itls)):
        histogram = Histogram(name, "", buckets=BOUNDS, registry=registry)
        for value in values:
            histogram.observe(value)
    return parse(generate_latest(registry).decode())


def book() -> AttainmentBook:
    return AttainmentBook(ttft_s=1.0, itl_s=0.1, window_s=10.0, least=4)


def test_only_what_came_within_the_window_counts() -> None:
    one = book()
    slow = [5.0] * 4
    assert one.add(0.0, {"a": reading(slow, [])}) == Attainment(), "what came before it looked is not lately"
    assert one.add(5.0, {"a": reading([*slow, 0.5, 0.5, 0.5, 5.0], [])}) == Attainment(ttft=0.75)
    assert one.add(16.0, {"a": reading([*slow, 0.5, 0.5, 0.5, 5.0], [])}) == Attainment()


def test_gateways_add_up_and_one_that_started_again_counts_from_nothing() -> None:
    one = book()
    one.add(0.0, {"a": reading([0.5] * 10, []), "b": reading([0.5] * 10, [])})
    assert one.add(1.0, {"a": reading([5.0] * 4, []), "b": reading([0.5] * 14, [])}) == Attainment(ttft=0.5)
    assert one.add(2.0, {"b": reading([0.5] * 18, [])}) == Attainment(ttft=8 / 12), "a did not answer"


def test_inside_a_bucket_observations_are_spread_evenly() -> None:
    one = AttainmentBook(ttft_s=0.55, itl_s=20.0, window_s=10.0, least=1)
    one.add(0.0, {"a": reading([], [])})
    assert one.add(1.0, {"a": reading([0.5] * 4, [11.0, 5.0])}) == Attainment(pytest.approx(0.5), 0.5)


def test_what_is_missed_is_named() -> None:
    assert Attainment(0.5, None).misses(0.9) == "50% of TTFTs in time"
    assert Attainment(0.5, 0.8).misses(0.9) == "50% of TTFTs in time and 80% of ITLs in time"
    assert Attainment(0.95, None).misses(0.9) == ""


@given(st.lists(st.lists(st.floats(0, 20), max_size=8), min_size=2, max_size=6), st.floats(0.01, 30))
def test_shares_are_shares_and_grow_with_the_bound(rounds: list[list[float]], bound_s: float) -> None:
    seen: list[float] = []
    books = [AttainmentBook(ttft_s=bound_s * k, itl_s=1.0, window_s=100.0, least=1) for k in (1, 2, 4)]
    for now_s, values in enumerate(rounds):
        seen += values
        found = [one.add(float(now_s), {"a": reading(seen, [])}).ttft for one in books]
        known = [share for share in found if share is not None]
        assert all(-1e-9 <= share <= 1 + 1e-9 for share in known)
        assert all(a <= b + 1e-9 for a, b in pairwise(known))
