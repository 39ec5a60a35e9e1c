"""Whether what clients saw may have happened.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvferry import OverloadedError, UnavailableError
from tests.chaos.requests import TIMEOUT_S, Asking, Case, Outcome

# The clock of a client that waits for a processor too.
LATE_S = 5.0
# From the death of a gateway to when its successor serves.
AWAY_S = 30.0


class Verdict(Enum):
    COMPLETED = "completed"
    LEFT = "left by their clients"
    REFUSED = "refused"
    CUT_OFF = "cut off with their gateway"
    WRONG = "wrong"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Window:
    began_s: float
    ended_s: float

    def holds(self, outcome: Outcome) -> bool:
        return self.began_s <= outcome.began_s and outcome.ended_s <= self.ended_s


@dataclass(slots=True)
class History:
    """When gateways were killed, and when every member was restarted in turn with nothing else going on: then nobody may
    even be refused."""

    gateway_kills_s: list[float] = field(default_factory=list)
    rolls: list[Window] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Judged:
    outcome: Outcome
    verdict: Verdict
    why: str = ""


def judge(outcome: Outcome, expected: Mapping[Case, Sequence[int]], history: History) -> Judged:
    """Every token that arrived must be the undisturbed answer's.  Who began to be answered is answered to the end, unless
    the gateway itself was killed.  Who is refused is told so by a typed error with a hint when to come back, or finds no
    gateway when one was killed."""
    wanted = tuple(expected[outcome.case])
    got = outcome.token_ids
    if got != wanted[: len(got)] or (outcome.completed and got != wanted):
        at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
        return Judged(outcome, Verdict.WRONG, f"differs at token {at}: {got[at : at + 4]} for {wanted[at : at + 4]}")
    elapsed_s = outcome.ended_s - outcome.began_s
    if elapsed_s > TIMEOUT_S + LATE_S:
        return Judged(outcome, Verdict.LOST, f"ended {elapsed_s - TIMEOUT_S:.1f} s after its deadline")
    if outcome.left:
        return Judged(outcome, Verdict.LEFT)
    error = outcome.error
    if error is None:
        why = "" if outcome.completed else "the stream ended without its end"
        return Judged(outcome, Verdict.COMPLETED if outcome.completed else Verdict.LOST, why)
    said = f"{type(error).__name__} {getattr(error, 'reason', '')}: {error}"
    if not isinstance(error, UnavailableError | OverloadedError):
        return Judged(outcome, Verdict.LOST, said)
    if got:
        killed = any(outcome.began_s <= at_s <= outcome.ended_s for at_s in history.gateway_kills_s)
        return Judged(outcome, Verdict.CUT_OFF if killed else Verdict.LOST, f"after {len(got)} tokens: {said}")
    if any(roll.holds(outcome) for roll in history.rolls):
        return Judged(outcome, Verdict.LOST, f"refused in a rolling restart: {said}")
    away = any(outcome.began_s - AWAY_S <= at_s <= outcome.ended_s for at_s in history.gateway_kills_s)
    if error.retry_after_s is None and not away:
        return Judged(outcome, Verdict.LOST, f"no hint when to come back: {said}")
    return Judged(outcome, Verdict.REFUSED, said)


def hangs(asking: Asking, now_s: float) -> Judged:
    """What a request is that has not ended long after it must."""
    outcome = Outcome(asking.case, asking.began_s, now_s, (), "", completed=False)
    return Judged(outcome, Verdict.LOST, f"has not ended {now_s - asking.began_s - TIMEOUT_S:.0f} s after its deadline")
