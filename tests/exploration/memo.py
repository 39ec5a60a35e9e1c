"""The states that a deterministic core can be in, each call from each of them run once."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Hashable
from enum import Enum
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

T = TypeVar("T", bound=Hashable)


class Violation(Exception):
    """A promise was broken."""


class Numbers(Generic[T]):
    """Equal values have one number, in the order of their coming, from 0 on."""

    def __init__(self) -> None:
        self._numbers: dict[T, int] = {}
        self._values: list[T] = []

    def of(self, value: T) -> int:
        number = self._numbers.setdefault(value, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        return number

    def __getitem__(self, number: int) -> T:
        return self._values[number]


class Memo:
    """The states of a kind of core.  ``call`` runs a method on a copy; equal states are one."""

    def __init__(self) -> None:
        self._states: dict[object, int] = {}
        self._numbers: dict[bytes, int] = {}  # equal states may have unequal pickles, never the other way round
        self._pickles: list[bytes] = []
        self._outcomes: dict[object, tuple[int, Any] | Violation] = {}

    def add(self, core: object) -> int:
        pickled = pickle.dumps(core)
        number = self._numbers.get(pickled)
        if number is None:
            number = self._numbers[pickled] = self._states.setdefault(_frozen(core), len(self._pickles))
            if number == len(self._pickles):
                self._pickles.append(pickled)
        return number

    def call(self, state: int, method: str, *arguments: object) -> tuple[int, Any]:
        key = (state, method, arguments)
        if key not in self._outcomes:
            core = pickle.loads(self._pickles[state])
            try:
                result = getattr(core, method)(*arguments)
                self._outcomes[key] = self.add(core), tuple(result) if isinstance(result, list) else result
            except (AssertionError, Violation) as e:
                self._outcomes[key] = Violation(str(e))
        outcome = self._outcomes[key]
        if isinstance(outcome, Violation):
            raise outcome
        return outcome

    def get(self, state: int, name: str) -> Any:
        key = (state, name)
        if key not in self._outcomes:
            self._outcomes[key] = state, getattr(pickle.loads(self._pickles[state]), name)
        return self._outcomes[key][1]  # type: ignore[index]


def _frozen(value: object) -> object:
    """A hashable that is equal for equal states."""
    match value:
        case Enum() | type() | None | int() | float() | str() | bytes():
            return value
        case dict() if type(value) is dict:
            return frozenset((k, _frozen(v)) for k, v in value.items())
        case dict():
            return tuple((k, _frozen(v)) for k, v in value.items())  # its order means something
        case list() | tuple() | deque():
            return tuple(map(_frozen, value))
        case set() | frozenset():
            return frozenset(map(_frozen, value))
        case Message():
            return type(value), value.SerializeToString(deterministic=True)
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    names = [*getattr(value, "__dict__", ()), *(s for s in slots if hasattr(value, s))]
    return type(value), tuple((name, _frozen(getattr(value, name))) for name in names)
