"""Tokens to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
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
    A stream costs time in proportion to its text and to the number of stop strings.  Not for use by several threads.
    """

    __slots__ = ("_decode", "_first_chars", "_held", "_matchers", "_token_bytes", "stopped")

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        assert all(stop), "stop strings are not empty"
        self._token_bytes = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._matchers = [_Matcher(string) for string in dict.fromkeys(stop)]
        self._first_chars = frozenset(string[0] for string in stop)
        self._held = ""
        # A stop string has appeared: the answer is complete, and tokens fed later yield nothing.
        self.stopped = False

    def feed(self, token_id: int) -> str:
        """Takes the next token; returns the text that is now certain, often that token's own, maybe none."""
        if self.stopped:
            return ""
        return self._advance(self._decode(self._token_bytes(token_id)))

    def flush(self) -> str:
        """Ends the answer: returns what was held back.  An incomplete character becomes U+FFFD.  Once only."""
        if self.stopped:
            return ""
        # After a hit nothing is held.
        emitted = self._advance(self._decode(b"", final=True)) + self._held
        self._held = ""
        return emitted

    def _advance(self, text: str) -> str:
        # Nothing held means that no stop string has begun; most tokens begin none either.
        if not self._held and (not self._matchers or self._first_chars.isdisjoint(text)):
            return text
        held = self._held + text
        for index, char in enumerate(text, start=len(self._held) + 1):
            # Every matcher must see the character: the longest of those that end here counts.
            length = max([len(matcher.stop) for matcher in self._matchers if matcher.advance(char)], default=0)
            if length:
                self.stopped = True
                self._held = ""
                return held[: index - length]
        certain = len(held) - max(matcher.num_matched for matcher in self._matchers)
        self._held = held[certain:]
        return held[:certain]


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
