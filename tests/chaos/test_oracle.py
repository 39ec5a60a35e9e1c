"""The oracle finds what it is there for, and a schedule is the same each time."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from kvferry import DeadlineError, InternalError, OverloadedError, UnavailableError
from tests.chaos.oracle import LATE_S, History, Verdict, Window, judge
from tests.chaos.requests import TIMEOUT_S, Case, Outcome
from tests.chaos.schedule import Kind, faults

CASE = Case("prompt", 4, 0.0, 1)
EXPECTED = {CASE: (5, 6, 7, 8)}
GOOD = Outcome(CASE, 100.0, 103.0, (5, 6, 7, 8), "text", completed=True)
BUSY = OverloadedError("busy", retry_after_s=1.0)
GONE = UnavailableError("gone")


def refused(error: Exception) -> Outcome:
    return replace(GOOD, token_ids=(), completed=False, error=error)


def cut(error: Exception) -> Outcome:
    return replace(GOOD, token_ids=(5, 6), completed=False, error=error)


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (GOOD, Verdict.COMPLETED),
        (replace(GOOD, token_ids=(5, 6, 9, 8)), Verdict.WRONG),
        (replace(GOOD, token_ids=(5, 6, 7)), Verdict.WRONG),
        (replace(GOOD, token_ids=(5, 6, 7, 8, 8)), Verdict.WRONG),
        (replace(GOOD, token_ids=(5, 5), completed=False, left=True), Verdict.WRONG),
        (replace(cut(GONE), token_ids=(6,)), Verdict.WRONG),
        (replace(GOOD, token_ids=(5, 6), completed=False, left=True), Verdict.LEFT),
        (replace(GOOD, ended_s=100.0 + TIMEOUT_S + LATE_S + 1), Verdict.LOST),
        (replace(GOOD, completed=False), Verdict.LOST),
        (refused(BUSY), Verdict.REFUSED),
        (refused(UnavailableError("lost", retry_after_s=2.0)), Verdict.REFUSED),
        (refused(GONE), Verdict.LOST),
        (refused(OverloadedError("busy")), Verdict.LOST),
        (refused(InternalError("bug")), Verdict.LOST),
        (refused(DeadlineError("late")), Verdict.LOST),
        (refused(ValueError("no error of ours")), Verdict.LOST),
        (cut(GONE), Verdict.LOST),
        (cut(BUSY), Verdict.LOST),
    ],
)
def test_what_a_client_saw_is_judged(outcome: Outcome, verdict: Verdict) -> None:
    assert judge(outcome, EXPECTED, History()).verdict is verdict


def test_a_gateway_that_was_killed_excuses_what_it_did_and_nothing_else() -> None:
    killed = History(gateway_kills_s=[102.0])
    assert judge(cut(GONE), EXPECTED, killed).verdict is Verdict.CUT_OFF
    assert judge(refused(GONE), EXPECTED, killed).verdict is Verdict.REFUSED
    assert judge(cut(InternalError("bug")), EXPECTED, killed).verdict is Verdict.LOST
    assert judge(cut(GONE), EXPECTED, History(gateway_kills_s=[99.0])).verdict is Verdict.LOST
    assert judge(replace(cut(GONE), token_ids=(6,)), EXPECTED, killed).verdict is Verdict.WRONG


def test_in_a_rolling_restart_nobody_is_even_refused() -> None:
    assert judge(refused(BUSY), EXPECTED, History(rolls=[Window(99.0, 104.0)])).verdict is Verdict.LOST
    assert judge(refused(BUSY), EXPECTED, History(rolls=[Window(101.0, 104.0)])).verdict is Verdict.REFUSED


def test_a_seed_gives_the_same_schedule_and_every_kind_early() -> None:
    def first(seed: int, count: int) -> list[object]:
        return list(islice(faults(seed, ["prefill-0", "decode-0"], ["gateway-0"]), count))

    assert first(1, 50) == first(1, 50)
    assert first(1, 50) != first(2, 50)
    assert {fault.kind for fault in islice(faults(3, ["decode-0"], ["gateway-0"]), len(Kind))} == set(Kind)
    few = islice(faults(3, ["decode-0"], ["gateway-0"], {Kind.KILL}), 20)
    assert {fault.kind for fault in few} == {Kind.KILL}
