"""The budget against a naive model that remembers everything."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.retry_budget import RetryBudget, Slice

WINDOW_S = 10.0


def spend_all(budget: RetryBudget, now_s: float) -> list[Slice]:
    spent = []
    while budget.can_spend(now_s):
        spent.append(budget.spend(now_s))
        assert len(spent) < 1000
    return spent


def test_without_requests_there_is_the_floor_and_after_the_window_again() -> None:
    budget = RetryBudget(0.2, floor_per_s=0.5)
    assert len(spend_all(budget, 100.0)) == 5
    assert len(spend_all(budget, 105.0)) == 0
    assert len(spend_all(budget, 100.0 + WINDOW_S)) == 0  # of a slice that is not wholly out of the window
    assert len(spend_all(budget, 101.0 + WINDOW_S)) == 5


def test_requests_bring_their_share_for_as_long_as_the_window() -> None:
    budget = RetryBudget(0.2, floor_per_s=0.0)
    for number in range(50):
        budget.request(number / 50)
    assert len(spend_all(budget, 1.0)) == 10
    assert not budget.can_spend(1.5 + WINDOW_S)


@pytest.mark.parametrize("num_sharers", [1, 2, 3, 8, 100])
def test_parts_of_a_gateway_have_together_what_one_would(num_sharers: int) -> None:
    """But that each may make one."""
    parts = [RetryBudget(0.2, num_sharers=num_sharers) for _ in range(num_sharers)]
    assert 0.7 * 30 < sum(len(spend_all(part, 0.0)) for part in parts) <= max(30, num_sharers)
    shared = [RetryBudget(0.2, num_sharers=num_sharers) for _ in range(num_sharers)]
    for number in range(1000):
        shared[number % num_sharers].request(0.0)
    total = sum(len(spend_all(part, 0.0)) for part in shared)
    assert 230 - num_sharers <= total <= max(230, 200 + num_sharers)


def test_what_got_somewhere_costs_nothing() -> None:
    budget = RetryBudget(0.0, floor_per_s=0.1)
    for _ in range(100):
        assert budget.can_spend(0.0)
        budget.give_back(budget.spend(0.0))
    spent = budget.spend(0.0)
    assert not budget.can_spend(WINDOW_S - 1)
    assert budget.can_spend(WINDOW_S + 1)
    budget.give_back(spent)  # out of the window already: nothing is gained by it
    assert len(spend_all(budget, WINDOW_S + 1)) == 1


# Of a slice that is partly out of the window, retries count no less long than others.
EARLY = [(0.0, "request"), (0.9, "retry"), (0.0, "retry"), (9.2, "retry")]


@example(EARLY)
@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.sampled_from(["request", "retry", "give back"])), max_size=80))
def test_no_window_has_more_fruitless_retries_than_it_may(steps: list[tuple[float, str]]) -> None:
    budget = RetryBudget(0.5, floor_per_s=0.2)
    now_s, requests, retries = 0.0, [], []
    for elapsed_s, kind in steps:
        now_s += elapsed_s
        if kind == "request":
            budget.request(now_s)
            requests.append(now_s)
        elif kind == "give back" and retries:
            budget.give_back(retries.pop()[1])
        elif kind == "retry":
            # Slices are rough: what is up to one of them older than the window may still count, on both sides.
            recent = sum(at_s > now_s - WINDOW_S for at_s, _ in retries)
            most = 2.0 + 0.5 * sum(at_s > now_s - WINDOW_S - 1 for at_s in requests)
            if budget.can_spend(now_s):
                assert recent + 1 <= most
                retries.append((now_s, budget.spend(now_s)))
            else:
                known = sum(at_s > now_s - WINDOW_S + 1 for at_s in requests)
                counted = sum(at_s > now_s - WINDOW_S - 1 for at_s, _ in retries)
                assert counted + 1 > 2.0 + 0.5 * known


def test_only_what_was_spent_is_given_back() -> None:
    budget = RetryBudget(0.0)
    spent = budget.spend(0.0)
    budget.give_back(spent)
    with pytest.raises(AssertionError):
        budget.give_back(spent)
