"""Tokens to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence


class TextStream:
    """The text of one answer, as far as it is certain.

    ``token_bytes`` gives the bytes that a token stands for (none for a special token that has no text); ``stop`` are the
    strings that end the answer, none of them empty.  However the bytes are split over tokens, what ``feed`` and ``flush``
    return adds up to the decoding of all bytes, with U+FFFD for what is not UTF-8 as ``bytes.decode`` puts it, cut before
    the first stop string.

    The first stop string is the one that is complete first; of several that end at the same character, the longest.  So
    a hit is known with its last character and never waits for what may follow.

    Text may lag behind tokens: an incomplete character, and a tail that a stop string may begin with, are held back.
    ``num_tokens_settled`` says how many tokens, from the first on, have nothing left to be said of them.  A stream costs
    time in proportion to its text and to the number of stop strings.  Not for use by several threads.
    """

    __slots__ = ("_decoder", "_first_chars", "_held", "_matchers", "_num_bytes", "_num_chars", "_settled", "_stopped",
                 "_token_bytes", "_undecoded", "_unemitted")  # fmt: skip

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        assert all(stop), "stop strings are not empty"
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_Matcher(string) for string in dict.fromkeys(stop)]
        self._first_chars = frozenset(string[0] for string in stop)
        self._held = ""
        self._stopped = False
        self._settled = 0
        self._num_bytes = 0
        self._num_chars = 0
        # Tokens not yet settled, oldest first: of those with bytes yet to be decoded where their bytes end, of the
        # others where the decoded text ended when their last byte was.
        self._undecoded: deque[int] = deque()
        self._unemitted: deque[int] = deque()

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared.  The answer is then complete, and tokens fed later yield nothing."""
        return self._stopped

    @property
    def num_tokens_settled(self) -> int:
        """How many of the tokens fed so far have all of their text emitted, or cut off by a stop string."""
        return self._settled

    def feed(self, token_id: int) -> str:
        """Takes the next token; returns the text that is now certain, often that token's own, maybe none."""
        data = self._token_bytes(token_id)
        if self._stopped:
            self._settled += 1
            return ""
        text = self._decoder.decode(data)
        self._num_bytes += len(data)
        self._undecoded.append(self._num_bytes)
        return self._advance(text)

    def flush(self) -> str:
        """Ends the answer: returns what was held back.  An incomplete character becomes U+FFFD.  Once only."""
        if self._stopped:
            return ""
        # After a hit nothing is held.
        emitted = self._advance(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        self._settle(0)
        return emitted

    def _advance(self, text: str) -> str:
        self._num_chars += len(text)
        held = self._held + text
        # Nothing held means that no stop string has begun; most tokens begin none either.
        if not self._held and self._first_chars.isdisjoint(text):
            self._settle(0)
            return held
        for index, char in enumerate(text, start=len(self._held) + 1):
            # Every matcher must see the character: the longest of those that end here counts.
            length = max([len(matcher.stop) for matcher in self._matchers if matcher.advance(char)], default=0)
            if length:
                self._stopped = True
                self._held = ""
                self._settled += len(self._undecoded) + len(self._unemitted)
                self._undecoded.clear()
                self._unemitted.clear()
                return held[: index - length]
        num_held = max(matcher.num_matched for matcher in self._matchers)
        certain = len(held) - num_held
        self._held = held[certain:]
        self._settle(num_held)
        return held[:certain]

    def _settle(self, num_held: int) -> None:
        num_decoded = self._num_bytes - len(self._decoder.getstate()[0])
        num_emitted = self._num_chars - num_held
        while self._undecoded and self._undecoded[0] <= num_decoded:
            self._undecoded.popleft()
            self._unemitted.append(self._num_chars)
        while self._unemitted and self._unemitted[0] <= num_emitted:
            self._unemitted.popleft()
            self._settled += 1


class _Matcher:
    """Follows one stop string through a text, character by character (Knuth, Morris and Pratt, 1977).

    ``num_matched`` is the length of the longest tail of the text that the stop string begins with.  The table of
    borders grows only as far as the text has matched, so a huge stop string that never appears costs nothing.
    """

    __slots__ = ("_borders", "num_matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        # _borders[n]: length of the longest proper prefix of stop[:n] that is also its suffix.
        self._borders = [0, 0]

    def advance(self, char: str) -> bool:
        """Takes one character; True when the stop string ends with it, after which it must not be called again."""
        stop, borders = self.stop, self._borders
        matched = self.num_matched
        while matched and stop[matched] != char:
            matched = borders[matched]
        if stop[matched] == char:
            matched += 1
        self.num_matched = matched
        if matched == len(borders):
            border = borders[matched - 1]
            while border and stop[border] != char:
                border = borders[border]
            borders.append(border + 1 if stop[border] == char else border)
        return matched == len(stop)
