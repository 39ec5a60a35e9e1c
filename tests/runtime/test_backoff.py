"""Delays that grow, and that no two clients share."""

from __future__ import annotations

from services.runtime.backoff import Backoff, jittered


def test_delays_double_to_their_cap_and_start_again() -> None:
    backoff = Backoff(initial_s=0.1, cap_s=0.5)
    for bound_s in (0.1, 0.2, 0.4, 0.5, 0.5):
        assert bound_s / 2 <= backoff.next_s() <= bound_s
    backoff.reset()
    assert backoff.next_s() <= 0.1


def test_who_failed_together_does_not_come_back_together() -> None:
    assert len({Backoff(1.0, 1.0).next_s() for _ in range(50)}) > 40
    hints = {jittered(2.0) for _ in range(50)}
    assert len(hints) > 40
    assert all(2.0 <= hint <= 3.0 for hint in hints), "never sooner than was meant"
