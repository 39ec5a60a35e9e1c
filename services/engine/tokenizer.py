"""Text to token ids and back, to the byte.  No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Any

import tokenizers

from kvferry import errors
from services.engine.model_config import ModelError


class Tokenizer:
    """A model's words.  Thread-safe: nothing changes after construction.

    Detokenization is by bytes: ``token_bytes`` of successive tokens, concatenated and read as UTF-8, is the text, so a
    stream can be decoded incrementally by holding back no more than an incomplete character.  Special tokens have no
    bytes.

    ``strips_leading_space``: words carry their leading space (Llama 2, Mistral), and ``decode`` takes one space off the
    beginning of a whole text, as the tokenizer put one there.  A continuation of a prompt is no beginning: its text is the
    concatenation of ``token_bytes`` as they are.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, bos_id: int | None, eos_ids: Iterable[int]) -> None:
        self._backend = backend
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        # Of added tokens, and of others that were asked for.
        self._known = {
            token_id: b"" if token.special else token.content.encode()
            for token_id, token in backend.get_added_tokens_decoder().items()
        }
        steps = _decoder_steps(backend)
        kinds = {step["type"] for step in steps}
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds & {"Replace", "Metaspace"}:
            raise ModelError(
                f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is neither byte-level nor "
                "sentencepiece-like; kvferry supports these two"
            )
        self._byte_fallback = "ByteFallback" in kinds
        self.strips_leading_space = any(_strips(step) for step in steps)

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Special tokens written out in ``text`` are recognised.  ``add_special``: begin as the model's prompts do (with
        the beginning-of-sequence token, where it has one); False for text from a chat template, which writes its own.
        May be empty for a text that is not: vocabularies may lack rare bytes.  InvalidRequestError for half a surrogate
        pair, which JSON can smuggle into a str and no encoding can express."""
        try:
            # As a batch of one: encode() would hold the interpreter's lock, for seconds where the text is long.
            return list(self._backend.encode_batch([text], add_special_tokens=add_special)[0].ids)
        except TypeError as error:
            raise errors.InvalidRequestError(
                "the prompt is not valid Unicode: it holds half a surrogate pair"
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        """The whole text of ``ids``; what is no UTF-8 becomes U+FFFD."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text.  Empty for special tokens and for ids that the vocabulary does not hold (models
        pad theirs)."""
        known = self._known.get(token_id)
        if known is not None:
            return known
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        data = self._known[token_id] = self._bytes_of(token)
        return data

    def _bytes_of(self, token: str) -> bytes:
        if self._byte_level:
            alphabet = byte_of_letter()
            try:
                return bytes(alphabet[letter] for letter in token)
            except KeyError:  # written outside the byte alphabet, so it stands for itself
                return token.encode()
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()

    @cached_property
    def longest_token_nbytes(self) -> int:
        """No text of n tokens has more than n times as many bytes, but for what normalization takes away."""
        return max(len(self.token_bytes(token_id)) for token_id in range(self.vocab_size))

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token(self, token_id: int | None) -> str | None:
        """How the vocabulary spells it; None for no or an unknown id."""
        return None if token_id is None else self._backend.id_to_token(token_id)


@lru_cache(maxsize=1)
def byte_of_letter() -> dict[str, int]:
    """GPT-2's spelling of bytes as letters: printable ones stand for themselves, the others for U+0100 onward."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _strips(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        return bool(scheme != "never")
    return bool(step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
