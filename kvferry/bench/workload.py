"""What is asked: lengths drawn or read from traces, prompts made of token ids.  Pure but for the reading of files."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from kvferry.bench.lengths import Draw
from kvferry.errors import InvalidRequestError

HASHED_TOKENS = 512  # that one of Mooncake's hash ids stands for


@dataclass(frozen=True, slots=True)
class Ask:
    """``at_s`` is 0 where no trace gives a time.  Equal ``hash_ids`` at the same place mean equal tokens, 512 each."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()


def drawn(prompt: Draw, output: Draw, seed: int) -> Iterator[Ask]:
    """Endless."""
    lengths = random.Random(f"lengths {seed}")
    while True:
        yield Ask(0.0, prompt(lengths), output(lengths))


def read_trace(path: Path) -> list[Ask]:
    """Mooncake's JSON lines or Azure's CSV, in order of time.  Raises InvalidRequestError, which names the line."""
    number = 0
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            read = _mooncake if path.suffix == ".jsonl" else _azure
            asks = []
            for ask in read(lines):
                number += 1
                if ask.num_prompt_tokens > 0 and ask.num_output_tokens > 0:
                    asks.append(ask)
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(
            f"{path}: entry {number + 1} is neither Mooncake's (timestamp, input_length, output_length, hash_ids; "
            f".jsonl) nor Azure's (TIMESTAMP,ContextTokens,GeneratedTokens; .csv): {error!r}"
        ) from error
    if not asks:
        raise InvalidRequestError(f"{path} holds no requests")
    return sorted(asks, key=lambda ask: ask.at_s)


def _mooncake(lines: Iterator[str]) -> Iterator[Ask]:
    for line in lines:
        if line.strip():
            entry = json.loads(line)
            yield Ask(
                entry["timestamp"] / 1000,
                int(entry["input_length"]),
                int(entry["output_length"]),
                tuple(map(int, entry.get("hash_ids", ()))),
            )


def _azure(lines: Iterator[str]) -> Iterator[Ask]:
    for row in csv.DictReader(lines):
        # Seven digits of a second, of which datetime takes six.
        at = datetime.fromisoformat(row["TIMESTAMP"][:26])
        since = (at - datetime(1970, 1, 1)).total_seconds()
        yield Ask(since, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


class Prompts:
    """Token ids for asks, the same for the same seed.  ``vocab_size`` is the model's."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        # Special tokens stand at either end of the vocabularies in use.
        self._ids = range(vocab_size // 16, vocab_size - vocab_size // 16)
        if not self._ids:
            raise InvalidRequestError(f"a vocabulary of {vocab_size} tokens leaves none to make prompts of")
        self._seed = seed
        self._block = lru_cache(maxsize=4096)(self._make_block)

    def make(self, ask: Ask, number: int) -> list[int]:
        """``number`` tells asks without hash ids apart; what hash ids do not cover is the ask's own."""
        ids: list[int] = []
        for hash_id in ask.hash_ids:
            ids += self._block(hash_id)
        missing = ask.num_prompt_tokens - len(ids)
        if missing > 0:
            ids += random.Random(f"prompt {self._seed} {number}").choices(self._ids, k=missing)
        return ids[: ask.num_prompt_tokens]

    def _make_block(self, hash_id: int) -> tuple[int, ...]:
        return tuple(random.Random(f"hash {self._seed} {hash_id}").choices(self._ids, k=HASHED_TOKENS))


def fitted(ask: Ask, context_length: int) -> Ask:
    """Cut, where prompt and answer together are longer than the model's context: first the prompt, then the answer."""
    if ask.num_prompt_tokens + ask.num_output_tokens <= context_length:
        return ask
    output = min(ask.num_output_tokens, max(1, context_length // 2))
    return Ask(ask.at_s, min(ask.num_prompt_tokens, context_length - output), output, ask.hash_ids)
