"""How many blocks those who are here may yet take.  Pure.

Sequences that decode together grow together and give back what they hold one after the other; what counts is the most that
they will hold at once (as in the Past-Future scheduler of Gong et al., ASPLOS 2025).  How long an answer gets nobody knows:
it is taken to end where those of late did that had got as far.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

# Of an answer, as long as none has ended yet.
FIRST_GUESS_TOKENS = 64
_WINDOW = 128
_MOST_MOMENTS = 16


class AnswerLengths:
    """Of the answers that ended last, in tokens."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=_WINDOW)
        self._ascending: list[int] = []
        self._sums: list[int] = []  # of these and all longer ones; empty: to be made again

    def ended(self, num_tokens: int) -> None:
        self._recent.append(num_tokens)
        self._sums = []

    def expected(self, num_tokens: int, max_tokens: int) -> int:
        """Of an answer that has ``num_tokens`` and is not at its end, how many it will have: the mean of those that got
        further; where none did, twice as many as it has."""
        if not self._sums and self._recent:
            self._ascending = sorted(self._recent)
            self._sums = list(accumulate(reversed(self._ascending)))[::-1]
        first = bisect_right(self._ascending, num_tokens)
        if first < len(self._ascending):
            longer = len(self._ascending) - first
            guess = -(-self._sums[first] // longer)
        else:
            guess = 2 * num_tokens if self._ascending else max(FIRST_GUESS_TOKENS, 2 * num_tokens)
        return min(max_tokens, max(guess, num_tokens + 1))


class Growing(NamedTuple):
    """A sequence that holds ``num_blocks``, those lent for it among them, will have ``num_tokens`` when it starts and
    ``num_to_come`` more at its end."""

    num_blocks: int
    num_tokens: int
    num_to_come: int


def peak_growth(sequences: Iterable[Growing], block_size: int) -> int:
    """By how many blocks what they hold together will rise at most, each with a token a step and none giving way.  Looked
    at when one ends; where many do, at some of these moments."""
    growing = sorted(sequences, key=lambda g: g.num_to_come)
    ends = sorted({g.num_to_come for g in growing})
    if len(ends) > _MOST_MOMENTS:
        ends = [ends[i * (len(ends) - 1) // (_MOST_MOMENTS - 1)] for i in range(_MOST_MOMENTS)]
    held = sum(g.num_blocks for g in growing)
    peak = held
    for end in ends:
        still_there = (g for g in growing if g.num_to_come >= end)
        peak = max(peak, sum(max(g.num_blocks, -(-(g.num_tokens + end) // block_size)) for g in still_there))
    return peak - held
