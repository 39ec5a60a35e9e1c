"""Every state that can be reached, shortest ways first."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from itertools import count
from typing import TypeVar

from tests.exploration.memo import Violation

State = TypeVar("State", bound=Hashable)


class Counterexample(Exception):
    """The shortest way to a broken promise, one action a line."""


def search(
    start: State,
    steps: Callable[[State], Iterable[tuple[str, State, bool]]],
    is_end: Callable[[State], bool],
    *,
    otherwise: str,
) -> int:
    """The number of states.  ``steps`` from one: what is said, the state then, and whether it is a fault, which need not
    happen: without it an end must still be reached; ``otherwise`` says what it means when none is.  Both may raise
    Violation, of which a Counterexample is made."""
    gc.disable()  # it would look through all states again and again, and they hold no cycles
    try:
        return _search(start, steps, is_end, otherwise)
    finally:
        gc.enable()


def _search(
    start: State,
    steps: Callable[[State], Iterable[tuple[str, State, bool]]],
    is_end: Callable[[State], bool],
    otherwise: str,
) -> int:
    states = {start: 0}
    came_from = [(0, "")]
    before: list[list[int]] = [[]]  # by steps that are no faults
    ends: list[int] = []
    queue = deque(states)
    for number in count():
        if not queue:
            break
        state = queue.popleft()
        try:
            if is_end(state):
                ends.append(number)
            for label, after, fault in steps(state):
                found = states.setdefault(after, len(states))
                if found == len(came_from):
                    came_from.append((number, label))
                    before.append([])
                    queue.append(after)
                if not fault:
                    before[found].append(number)
        except Violation as e:
            raise Counterexample(_trace(came_from, number, str(e))) from e
    good = set(ends)
    while ends:
        fresh = set(before[ends.pop()]) - good
        good |= fresh
        ends += fresh
    for number in range(len(states)):  # in order of distance
        if number not in good:
            raise Counterexample(_trace(came_from, number, otherwise))
    return len(states)


def _trace(came_from: list[tuple[int, str]], number: int, what: str) -> str:
    labels = []
    while number:
        number, label = came_from[number]
        labels.append(label)
    lines = [f"{place}. {label}" for place, label in enumerate(reversed(labels), 1)]
    return "\n".join([*lines, f"=> {what}"])
