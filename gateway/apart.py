"""Pairs of workers between which no bytes pass at the moment.  Pure: times come in, seconds of one monotonic clock."""

from __future__ import annotations

from collections.abc import Set

from gateway.candidates import WorkerKey

# Whoever asks in between need not find out for himself, which takes seconds; one that asks later does.
APART_S = 10.0
MAX_PAIRS = 4096

Pair = tuple[WorkerKey, WorkerKey]  # prefill, decode


class Apart:
    """A writer said that it cannot reach an owner, which others may reach all the same."""

    def __init__(self) -> None:
        self._until_s: dict[Pair, float] = {}  # the next to end first

    def add(self, prefill: WorkerKey, decode: WorkerKey, now_s: float) -> None:
        self._until_s.pop((prefill, decode), None)
        self._until_s[prefill, decode] = now_s + APART_S
        if len(self._until_s) > MAX_PAIRS:
            del self._until_s[next(iter(self._until_s))]

    def pairs(self, now_s: float) -> Set[Pair]:
        while self._until_s and self._until_s[first := next(iter(self._until_s))] <= now_s:
            del self._until_s[first]
        return self._until_s.keys()
