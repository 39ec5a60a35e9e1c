"""Whose turn it is."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.line import OUTPUT_WEIGHT, Line, Ticket


class Waiting(RuleBasedStateMachine):
    """Against a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.line: Line[int] = Line()
        self.waiting: list[Ticket[int]] = []
        self.served: Counter[str] = Counter()
        self.had_the_last_turn: str | None = None
        self.now_s = 0.0

    @rule(tenant=st.sampled_from("abc"), priority=st.integers(-1, 1), patience_s=st.integers(0, 5))
    def join(self, tenant: str, priority: int, patience_s: int) -> None:
        others = {t.tenant for t in self.waiting}
        if others and tenant not in others:
            self.served[tenant] = max(self.served[tenant], min(self.served[t] for t in others))
        self.now_s += 1
        due_s = self.now_s + patience_s
        ticket = self.line.join(len(self.waiting), tenant, priority=priority, now_s=self.now_s, due_s=due_s)
        self.waiting.append(ticket)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(ticket)
        for _ in range(2):
            self.line.leave(ticket)

    @precondition(lambda self: self.waiting)
    @rule(num_prompt=st.integers(0, 9), num_output=st.integers(0, 9))
    def go(self, num_prompt: int, num_output: int) -> None:
        ticket = self.line.first()
        assert ticket is not None
        self.now_s += 1
        self.line.leave(ticket, self.now_s)
        self.line.served(ticket.tenant, num_prompt, num_output)
        self.waiting.remove(ticket)
        self.had_the_last_turn = ticket.tenant
        self.served[ticket.tenant] += num_prompt + int(OUTPUT_WEIGHT) * num_output

    @invariant()
    def the_least_served_goes_first(self) -> None:
        self.line.check_integrity()
        assert len(self.line) == len(self.waiting)
        if not self.waiting:
            assert self.line.first() is None
            return
        heads = {}
        for ticket in sorted(self.waiting, key=lambda t: (-t.priority, t.due_s, t.turn)):
            heads.setdefault(ticket.tenant, ticket)
        assert self.line.first() is min(
            heads.values(), key=lambda t: (self.served[t.tenant], t.tenant == self.had_the_last_turn, t.turn)
        )


TestWaiting = Waiting.TestCase
TestWaiting.settings = settings(max_examples=60, stateful_step_count=40)


def served_of(weights: dict[str, float], num_turns: int) -> Counter[str]:
    """How many tokens each gets while all have more requests than can be served; a's are ten times as long."""
    line: Line[int] = Line()
    lengths = dict.fromkeys(weights, 10) | {"a": 100}
    for tenant in weights:
        for _ in range(num_turns):
            line.join(lengths[tenant], tenant, now_s=0.0)
    tokens: Counter[str] = Counter()
    for _ in range(num_turns):
        ticket = line.first()
        assert ticket is not None
        line.leave(ticket, 0.0)
        line.served(ticket.tenant, ticket.item, 0, weights[ticket.tenant])
        tokens[ticket.tenant] += ticket.item
    return tokens


def test_tenants_get_equal_tokens_whatever_their_requests_are_like() -> None:
    tokens = served_of({"a": 1, "b": 1, "c": 1}, 300)
    assert max(tokens.values()) - min(tokens.values()) <= 100


def test_a_tenant_of_twice_the_weight_gets_twice_as_much() -> None:
    tokens = served_of({"a": 1, "b": 2}, 300)
    assert tokens["b"] == pytest.approx(2 * tokens["a"], rel=0.1)


def test_what_a_newcomer_would_wait_is_the_work_before_it() -> None:
    line: Line[int] = Line()
    assert line.wait_s("a", 0, num_lanes=2) == 0
    for _ in range(8):
        line.join(0, "a", work_s=1.0, now_s=0.0)
    assert line.wait_s("a", 0, num_lanes=2) == 4
    assert line.wait_s("a", 1, num_lanes=2) == 0, "it would go before them"
    assert line.wait_s("b", 0, num_lanes=2) == 0.5, "they take turns"


def test_a_newcomer_waits_for_those_of_its_own_that_are_due_before_it() -> None:
    line: Line[int] = Line()
    long = line.join(0, "a", work_s=2.0, now_s=0.0, due_s=8.0)
    short = line.join(0, "a", work_s=0.5, now_s=1.0, due_s=3.0)
    assert line.first() is short
    assert [line.wait_s("a", 0, due_s=due_s, num_lanes=1) for due_s in (2.0, 3.0, 8.0)] == [0, 0.5, 2.5]
    line.leave(short, 2.0)
    line.join(0, "a", work_s=0.1, now_s=7.9, due_s=8.3)
    assert line.first() is long, "it has waited for long enough"


def test_what_a_newcomer_is_told_is_what_goes_before_it_where_a_short_one_has_overtaken() -> None:
    line: Line[int] = Line()
    line.join(0, "a", work_s=2.0, now_s=0.0, due_s=8.0)
    for _ in range(3):
        line.join(0, "b", work_s=1.0, now_s=0.0)
    line.join(0, "a", work_s=0.5, now_s=1.0, due_s=3.0)
    told_s, done_s = line.wait_s("a", 0, due_s=9.0, num_lanes=1), 0.0
    newcomer = line.join(0, "a", now_s=1.0, due_s=9.0)
    while (ticket := line.first()) is not newcomer:
        assert ticket is not None
        line.leave(ticket)
        line.served(ticket.tenant, 10, 0)
        done_s += ticket.work_s
    assert told_s == done_s == 5.5


def test_a_newcomer_waits_for_no_tenant_that_was_served_more() -> None:
    line: Line[int] = Line()
    for _ in range(8):
        line.join(0, "flooding", work_s=1.0, now_s=0.0)
    first = line.first()
    assert first is not None
    line.leave(first, 1.0)
    line.served("flooding", 100, 0)
    assert line.wait_s("modest", 0, num_lanes=1) == 0, "level with the other, which had the last turn"
    modest = line.join(0, "modest", work_s=1.0, now_s=1.0)
    assert line.first() is modest
    assert line.wait_s("modest", 0, num_lanes=1) == 2, "one of each before its second"
    line.leave(modest, 2.0)
    line.served("modest", 50, 0)
    assert line.wait_s("modest", 0, num_lanes=1) == 1, "it had its turn, and more than the other"


def test_a_line_that_moves_slowly_is_waited_for_longer() -> None:
    line: Line[int] = Line()
    tickets = [line.join(0, "a", work_s=0.01, now_s=0.0) for _ in range(8)]
    for turn, ticket in enumerate(tickets[:4]):
        line.leave(ticket, 3.0 * (turn + 1))
    assert line.wait_s("a", 0, num_lanes=1) == pytest.approx(12)
