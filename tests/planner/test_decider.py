"""When a worker should change its role, and when all stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.candidates import Role, WorkerKey
from services.planner.online.attainment import Attainment
from services.planner.online.decider import Decider, Decision, Grow, Move, Shrink, Terms
from services.planner.online.needs import Needs, NeedsBook, Sample

TERMS = Terms(itl_s=0.05, window_s=10.0, patience=3, cooldown_s=15.0)


def sample(name: str, role: Role, now_s: float, *, prefill: float = 0.0, running: int = 0) -> Sample:
    """``prefill``: the share of its time that goes there.  20 sequences are as many as 50 ms take."""
    return Sample(WorkerKey(name, 1), role, False, prefill * now_s, 0.0, now_s, running, 0, 1000.0, 0.01, 0.002, 0.0)


def fleet(now_s: float, prefill: float, running: int, num_prefill: int = 2) -> list[Sample]:
    return [
        sample(f"w{n}", Role.PREFILL, now_s, prefill=prefill) if n < num_prefill
        else sample(f"w{n}", Role.DECODE, now_s, running=running + n) for n in range(4)
    ]  # fmt: skip


def watch(decider: Decider, first_s: int, last_s: int, prefill: float, running: int) -> list[Decision]:
    return [decider.look(float(s), fleet(float(s), prefill, running)) for s in range(first_s, last_s)]


def test_the_needs_are_shares_of_time_waiting_work_and_sequences_by_what_a_step_may_take() -> None:
    book = NeedsBook(itl_s=0.05, window_s=10.0, catch_up_s=5.0)
    assert book.add(0.0, fleet(0.0, 0.5, 10)) is None
    waiting = [replace(s, num_queued_prefill_tokens=1250) for s in fleet(10.0, 0.5, 10)]
    assert book.add(10.0, waiting) == Needs(pytest.approx(2 * 0.5 + 4 * 1250 / 1000 / 5), pytest.approx((12 + 13) / 20))


def test_a_full_side_gets_the_worker_that_has_least_to_finish_after_some_patience() -> None:
    decisions = watch(Decider(TERMS), 1, 9, 1.0, 0)
    moves = [d.step for d in decisions]
    assert moves[:-1] == [None] * 7
    assert isinstance(moves[-1], Move)
    assert (moves[-1].worker.worker_id, moves[-1].role) == ("w2", Role.PREFILL)
    assert decisions[-1].reason == (
        "prefill needs 2.00 workers, decode 0.25: 3 and 1 take the fuller side from 100% to 67%; w2 becomes prefill"
    )


@pytest.mark.parametrize(("prefill", "running", "why"), [(0.5, 2, "there is room"), (1.0, 16, "the best split")])
def test_nothing_moves_without_need_or_gain(prefill: float, running: int, why: str) -> None:
    decisions = watch(Decider(TERMS), 1, 40, prefill, running)
    assert not any(d.step for d in decisions)
    assert why in decisions[-1].reason


def test_after_a_change_there_is_none_for_a_while() -> None:
    decider = Decider(TERMS)
    assert watch(decider, 1, 9, 1.0, 0)[-1].step
    decider.made(9.0)
    after = watch(decider, 9, 40, 1.0, 0)
    assert next(n for n, d in enumerate(after, 9) if d.step) == 24


def test_nothing_moves_while_a_worker_drains() -> None:
    decider = Decider(TERMS)
    for s in range(1, 40):
        first, *others = fleet(float(s), 1.0, 0)
        assert decider.look(float(s), [replace(first, draining=True), *others]).step is None


def test_objectives_that_are_missed_say_that_the_fuller_side_is_full() -> None:
    """By itself there would be room; in time or not known, it stays."""
    for attained, moves in ((Attainment(0.5, 1.0), True), (Attainment(1.0, 0.5), True), (Attainment(1.0, 0.95), False),
                            (Attainment(), False)):  # fmt: skip
        decider = Decider(TERMS)
        decisions = [decider.look(float(s), fleet(float(s), 0.5, 0), attained) for s in range(1, 20)]
        steps = {d.step for d in decisions if d.step is not None}
        assert bool(steps) is moves
        assert all(isinstance(step, Move) and step.role is Role.PREFILL for step in steps)


def test_a_worker_starts_where_the_best_split_is_full_and_none_beyond_the_most() -> None:
    terms = replace(TERMS, max_workers=5)
    steps = [d.step for d in watch(Decider(terms), 1, 9, 1.0, 12)]
    assert steps[:-1] == [None] * 7
    assert steps[-1] == Grow(Role.PREFILL)
    for most in (4, None):
        assert not any(d.step for d in watch(Decider(replace(TERMS, max_workers=most)), 1, 40, 1.0, 12))


def test_a_worker_goes_after_a_long_time_with_room_and_in_time() -> None:
    terms = replace(TERMS, max_workers=4, spare_s=30.0)
    decisions = watch(Decider(terms), 0, 60, 0.2, 2)
    first = next(n for n, d in enumerate(decisions) if d.step)
    assert first == 35, "seen from second 5 on"
    assert decisions[first].step == Shrink(Role.PREFILL)
    assert (decisions[first].num_prefill, decisions[first].num_decode) == (1, 2)
    late = Decider(terms)
    missed = [late.look(float(s), fleet(float(s), 0.2, 2), Attainment(0.5, 1.0)) for s in range(60)]
    assert not any(isinstance(d.step, Shrink) for d in missed)
    assert not any(d.step for d in watch(Decider(replace(terms, min_workers=4)), 0, 60, 0.2, 2))


def test_where_roles_stay_the_full_side_grows() -> None:
    terms = replace(TERMS, max_workers=5, change_roles=False)
    steps = {d.step for d in watch(Decider(terms), 1, 12, 1.0, 0)}
    assert steps == {None, Grow(Role.PREFILL)}
    assert {d.step for d in watch(Decider(replace(terms, max_workers=None)), 1, 12, 1.0, 0)} == {None}


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 80), st.floats(0, 1) | st.none()), min_size=30, max_size=120
    ),
    st.integers(2, 4), st.integers(4, 6), st.booleans(),
)  # fmt: skip
def test_whatever_is_reported_numbers_stay_within_their_bounds(
    load: list[tuple[float, int, float | None]], least: int, most: int, change_roles: bool
) -> None:
    terms = replace(TERMS, min_workers=least, max_workers=most, cooldown_s=2.0, spare_s=5.0, change_roles=change_roles)
    decider, roles = Decider(terms), {"w0": Role.PREFILL, "w1": Role.DECODE, "w2": Role.DECODE, "w3": Role.PREFILL}
    for now_s, (prefill, running, share) in enumerate(load):
        samples = [
            sample(n, r, float(now_s), prefill=prefill if r is Role.PREFILL else 0.0, running=running)
            for n, r in roles.items()
        ]
        decision = decider.look(float(now_s), samples, Attainment(share, share))
        assert change_roles or not isinstance(decision.step, Move)
        match decision.step:
            case None:
                continue
            case Move(worker, role):
                roles[worker.worker_id] = role
            case Grow(role):
                roles[f"n{now_s}"] = role
            case Shrink(role):
                del roles[next(name for name, each in roles.items() if each is role)]
        decider.made(float(now_s))
        assert least <= len(roles) <= most
        assert set(roles.values()) == {Role.PREFILL, Role.DECODE}


@settings(max_examples=30)
@given(
    st.integers(0, 6),
    st.integers(0, 6),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 80)), min_size=30, max_size=60),
)
def test_whatever_is_reported_neither_side_falls_below_its_least(
    num_prefill: int, num_decode: int, load: list[tuple[float, int]]
) -> None:
    roles = {f"w{n}": Role.PREFILL if n < num_prefill else Role.DECODE for n in range(num_prefill + num_decode)}
    decider, last_move_s = Decider(TERMS), float("-inf")
    for now_s, (prefill, running) in enumerate(load):
        samples = [sample(n, r, float(now_s), prefill=prefill, running=running) for n, r in roles.items()]
        decision = decider.look(float(now_s), samples)
        assert decision.num_prefill + decision.num_decode == len(roles)
        if decision.step is None:
            continue
        assert isinstance(decision.step, Move)
        assert now_s - last_move_s >= TERMS.cooldown_s
        last_move_s = now_s
        assert roles[decision.step.worker.worker_id] is not decision.step.role
        before = {role: list(roles.values()).count(role) for role in Role}
        roles[decision.step.worker.worker_id] = decision.step.role
        for role in Role:
            count = list(roles.values()).count(role)
            assert count >= min(1, before[role])
        decider.made(float(now_s))
