"""Times as words, for answers that come as text: the clock of one host, which all of its processes share.

A word is a token of a space and letters, so that those of an answer can be told apart however they were put together.
"""

from __future__ import annotations

import re

from services.engine.model_files import ModelFiles

NUM_WORDS = 20_000
UNIT_S = 100e-6
_WORD = re.compile(rb" [A-Za-z]+")


class Words:
    def __init__(self, files: ModelFiles) -> None:
        """Raises ValueError for a vocabulary that has too few."""
        texts = {n: files.tokenizer.token_bytes(n) for n in range(files.config.vocab_size)}
        self.ids = [n for n, text in texts.items() if _WORD.fullmatch(text)][:NUM_WORDS]
        if len(self.ids) < NUM_WORDS:
            raise ValueError(f"{files.config.name} has {len(self.ids)} words of letters, and {NUM_WORDS} are needed")
        self._texts = [texts[n] for n in self.ids]
        self._places = {text.strip(): place for place, text in enumerate(self._texts)}

    def id(self, now_s: float) -> int:
        """``now_s``: of time.monotonic()."""
        return self.ids[int(now_s / UNIT_S) % NUM_WORDS]

    def text(self, now_s: float) -> bytes:
        return self._texts[int(now_s / UNIT_S) % NUM_WORDS]

    def age_s(self, word: bytes, now_s: float) -> float:
        """How long ago, to ``UNIT_S``, a word without its space was made; wrong by a multiple of two seconds for what is
        older."""
        return ((now_s / UNIT_S - self._places[word]) % NUM_WORDS) * UNIT_S
