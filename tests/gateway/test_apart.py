from __future__ import annotations

from gateway.apart import APART_S, MAX_PAIRS, Apart
from gateway.candidates import WorkerKey

P, D, E = WorkerKey("p", 1), WorkerKey("d", 1), WorkerKey("e", 1)


def test_a_pair_is_apart_for_a_while_from_when_that_was_last_found() -> None:
    apart = Apart()
    apart.add(P, D, 0.0)
    apart.add(P, E, 1.0)
    apart.add(P, D, 2.0)
    assert set(apart.pairs(APART_S)) == {(P, D), (P, E)}
    assert set(apart.pairs(APART_S + 1.0)) == {(P, D)}
    assert set(apart.pairs(APART_S + 2.0)) == set()


def test_it_is_bounded() -> None:
    apart = Apart()
    for number in range(MAX_PAIRS + 1):
        apart.add(P, WorkerKey("d", number), 0.0)
    assert len(apart.pairs(1.0)) == MAX_PAIRS
