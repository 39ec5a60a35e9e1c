"""Drafts of what a sequence says next, looked up in its own text: answers quote their prompt, and repeat themselves.

Prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding): what followed the last few tokens when they
occurred last before is likely to follow them again.  Pure, and no model: whoever verifies a draft makes it right or wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

# Of the n-grams that are looked up, the longest first.  Pairs of tokens are everywhere in prose, and what follows them is
# wrong too often to pay in a batch of eight.
LENGTHS = (4, 3)
MAX_DRAFTS = (
    11  # with the token before them, the 12 rows that the kernels multiply with a panel in one go (MR in matmul.h)
)
_FIRST_DRAFTS = 3
_SHORTEST_PAUSE, _LONGEST_PAUSE = 8, 64  # tokens


class Drafter:
    """Of one sequence, whose tokens are only ever appended to.  A token costs an entry of a dict for each length of n-gram,
    some 400 bytes in all.  Not thread-safe.

    How many tokens are drafted follows success: twice as many when all were right, as many as were right when some were
    not, half when none was, and down at 0 none for a while, that gets longer with each vain trial.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}  # n-gram to the index of the token that followed it last
        self._num_indexed = 0
        self._most = _FIRST_DRAFTS
        self._pause = _SHORTEST_PAUSE
        self._resume_at = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow ``tokens``; none where nothing like their end occurred before."""
        most = min(most, self._most)
        if most < 1 or len(tokens) < self._resume_at:
            return []
        self._index(tokens)
        for length in LENGTHS:
            begin = self._next.get(tuple(tokens[-length:])) if len(tokens) > length else None
            if begin is not None:
                return _continue(tokens, begin, most)
        return []

    def learn(self, num_tokens: int, num_drafted: int, num_accepted: int) -> None:
        """So many drafts were verified, and so many were right; the sequence has ``num_tokens`` by now."""
        if num_accepted == num_drafted:
            self._most = min(2 * self._most, MAX_DRAFTS)
            self._pause = _SHORTEST_PAUSE
        elif num_accepted:
            self._most = num_accepted
        else:
            self._most //= 2
        if self._most == 0:
            self._most = 1
            self._resume_at = num_tokens + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _index(self, tokens: Sequence[int]) -> None:
        """The last n-gram is not yet followed by anything, and left for the next time."""
        for length in LENGTHS:
            first = max(self._num_indexed, length)
            followed = tokens[first - length : -1]
            grams = zip(*(followed[i:] for i in range(length)), strict=False)
            self._next.update(zip(grams, range(first, len(tokens)), strict=False))
        self._num_indexed = len(tokens)


def _continue(tokens: Sequence[int], begin: int, count: int) -> list[int]:
    """``count`` tokens from ``begin`` on; where the text ends, what was drafted goes round."""
    drafts = list(tokens[begin : begin + count])
    period = len(tokens) - begin
    while len(drafts) < count:
        drafts.append(drafts[-period])
    return drafts


def share_out(wanted: Sequence[int], room: int) -> list[int]:
    """How many of ``room`` rows each gets, at most what it wants: one after the other, in turns."""
    given = [0] * len(wanted)
    turn = 0
    while room > 0 and any(turn < most for most in wanted):
        for i, most in enumerate(wanted):
            if turn < most and room > 0:
                given[i] += 1
                room -= 1
        turn += 1
    return given
