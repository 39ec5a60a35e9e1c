from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.fence import Fence

TTL_S = 6.0


def fence(*, asked_s: float = 0.0, awake_s: float = 0.0) -> Fence:
    found = Fence(awake_s)
    found.granted(asked_s, TTL_S)
    return found


@pytest.mark.parametrize(
    ("awake_s", "now_s", "slept_s"),
    [
        (0.0, 5.9, None),  # the lease still stands
        (0.0, 6.0, 6.0),
        (1.9, 6.1, 4.2),  # less than a lease, and it ended meanwhile
        (5.9, 7.0, None),  # no longer than it may take to look again
        (7.0, 9.5, None),  # it had ended before, while the process was awake: nobody renewed it
        (7.0, 13.5, 6.5),  # as before, but nobody looked for as long as a lease
    ],
)
def test_who_sleeps_through_the_end_of_a_lease_is_told_so(awake_s: float, now_s: float, slept_s: float | None) -> None:
    assert fence(awake_s=awake_s).awake(now_s) == (None if slept_s is None else pytest.approx(slept_s))


def test_without_a_lease_there_is_nothing_to_sleep_through() -> None:
    assert Fence(0.0).awake(1000.0) is None


def test_a_renewal_counts_from_when_it_was_asked_for() -> None:
    """Stopped between asking and hearing the answer: the directory may have granted it long ago."""
    asked = fence(asked_s=0.0, awake_s=0.1)
    asked.granted(0.2, TTL_S)
    assert asked.awake(6.3) is not None


@given(st.lists(st.floats(0.01, TTL_S / 3), max_size=50), st.lists(st.booleans(), min_size=50, max_size=50))
def test_who_is_awake_goes_on_whatever_becomes_of_its_lease(steps: list[float], renewed: list[bool]) -> None:
    now_s = 0.0
    awake = fence()
    for step, is_renewed in zip(steps, renewed, strict=False):
        now_s += step * 0.999
        if is_renewed:
            awake.granted(now_s, TTL_S)
        assert awake.awake(now_s) is None


@given(st.floats(0.0, TTL_S / 3), st.floats(TTL_S, 1e6))
def test_nobody_sleeps_for_a_lease_and_goes_on(renewed_ago_s: float, slept_s: float) -> None:
    stopped_s = 10.0
    asleep = fence(asked_s=stopped_s - renewed_ago_s, awake_s=stopped_s)
    assert asleep.awake(stopped_s + slept_s) == pytest.approx(slept_s)
