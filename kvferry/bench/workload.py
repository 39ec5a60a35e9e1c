"""What is asked: lengths drawn or read from files, prompts made of token ids.  Pure but for the reading of files."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import cycle, pairwise
from math import isfinite
from pathlib import Path
from typing import Any

from kvferry.bench.lengths import Draw
from kvferry.errors import InvalidRequestError

HASHED_TOKENS = 512  # that one of Mooncake's hash ids stands for
MAX_TRACE_TOKENS = 2**31 - 1
CACHED_COLUMN = "CachedTokens"
CHARS_PER_TOKEN = 4  # of English text, about: the light client has no tokenizer

_ROW_TOKENS = 1 << 17
_OWN_TOKENS = 4

Prompt = list[int] | str


@dataclass(frozen=True, slots=True)
class Ask:
    """``at_s`` is 0 where no trace gives a time.  Equal ``hash_ids`` at the same place mean equal tokens, 512 each.
    ``num_cached_tokens`` of the prompt a cluster found in its caches, where one was asked.  ``text`` is the prompt itself
    where a file gave it; its number of tokens is then an estimate."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()
    text: str | None = None
    cut: bool = False
    num_cached_tokens: int = 0


def drawn(prompt: Draw, output: Draw, seed: int) -> Iterator[Ask]:
    """Endless."""
    lengths = random.Random(f"lengths {seed}")
    while True:
        yield Ask(0.0, prompt(lengths), output(lengths))


def shuffled(asks: Sequence[Ask], seed: int) -> Iterator[Ask]:
    """Endless: all in an order of the seed's, and again."""
    order = list(asks)
    random.Random(f"order {seed}").shuffle(order)
    return cycle(order)


def read_trace(path: Path) -> list[Ask]:
    """Mooncake's JSON lines or Azure's CSV, in order of time.  Raises InvalidRequestError, which names the line."""
    number = 0
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            read = _mooncake if path.suffix == ".jsonl" else _azure
            asks = []
            for ask in read(lines):
                number += 1
                if not (max(ask.num_prompt_tokens, ask.num_output_tokens) <= MAX_TRACE_TOKENS and isfinite(ask.at_s)):
                    raise ValueError("a number is out of range")
                if ask.num_prompt_tokens > 0 and ask.num_output_tokens > 0:
                    asks.append(ask)
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError, csv.Error) as error:
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
        cached = int(row.get(CACHED_COLUMN) or 0)
        yield Ask(since, int(row["ContextTokens"]), int(row["GeneratedTokens"]), num_cached_tokens=cached)


def write_trace(asks: Iterable[Ask]) -> str:
    """As Azure's CSV, with a column of ours for cached tokens, which it knows nothing of; ``read_trace`` reads it."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(("TIMESTAMP", "ContextTokens", "GeneratedTokens", CACHED_COLUMN))
    for ask in asks:
        at = datetime(1970, 1, 1) + timedelta(seconds=ask.at_s)
        stamp = at.isoformat(" ", "microseconds")
        rows.writerow((stamp, ask.num_prompt_tokens, ask.num_output_tokens, ask.num_cached_tokens))
    return out.getvalue()


def read_conversations(path: Path) -> list[Ask]:
    """Of a ShareGPT-like file, a JSON array of objects with ``conversations`` (or ``messages``): each one's first question,
    and the length of its answer.  Conversations without both are left out.  Raises InvalidRequestError."""
    try:
        found = [ask for entry in json.loads(path.read_text(encoding="utf-8")) if (ask := _first_turn(entry))]
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidRequestError(
            f'{path} is not like ShareGPT: a JSON array of {{"conversations": [{{"from": "human", "value": ..}}, '
            f'{{"from": "gpt", "value": ..}}]}}: {error!r}'
        ) from error
    if not found:
        raise InvalidRequestError(f"{path} holds no question with an answer")
    return found


def _first_turn(entry: dict[str, Any]) -> Ask | None:
    turns = entry["conversations"] if "conversations" in entry else entry["messages"]
    said = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]
    for (asker, question), (answerer, answer) in pairwise(said):
        if asker in ("human", "user") and answerer in ("gpt", "assistant") and question and answer:
            return Ask(0.0, _estimated_tokens(question), _estimated_tokens(answer), text=question)
    return None


def _estimated_tokens(text: str) -> int:
    return -(-len(text) // CHARS_PER_TOKEN)


class Prompts:
    """Token ids for asks, the same for the same seed.  ``vocab_size`` is the model's.  Made of pieces of one long row of
    random ids, each behind a few ids of its own, so that none shares a prefix with another by chance; drawing each id would
    hold up the loop that sends, by 30 ms for a prompt of 100 000."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        # Special tokens stand at either end of the vocabularies in use.
        self._ids = range(vocab_size // 16, vocab_size - vocab_size // 16)
        if not self._ids:
            raise InvalidRequestError(f"a vocabulary of {vocab_size} tokens leaves none to make prompts of")
        self._seed = seed
        self._row = random.Random(f"row {seed}").choices(self._ids, k=_ROW_TOKENS)
        self._block = lru_cache(maxsize=4096)(self._make_block)

    def make(self, ask: Ask, number: int) -> Prompt:
        """``number`` tells asks without hash ids apart; what hash ids do not cover is the ask's own."""
        if ask.text is not None:
            return ask.text
        ids: list[int] = []
        for hash_id in ask.hash_ids:
            ids += self._block(hash_id)
        missing = ask.num_prompt_tokens - len(ids)
        if missing > 0:
            ids += self._piece(f"prompt {number}", missing)
        return ids[: ask.num_prompt_tokens]

    def _make_block(self, hash_id: int) -> list[int]:
        return self._piece(f"hash {hash_id}", HASHED_TOKENS)

    def _piece(self, name: str, length: int) -> list[int]:
        drawn = random.Random(f"{name} {self._seed}")
        piece = drawn.choices(self._ids, k=min(length, _OWN_TOKENS))
        while (missing := length - len(piece)) > 0:
            start = drawn.randrange(_ROW_TOKENS)
            piece += self._row[start : start + missing]
        return piece


def fitted(ask: Ask, context_length: int) -> Ask:
    """Cut, and marked so, where prompt and answer together are longer than the model's context: first the prompt, then the
    answer."""
    if ask.num_prompt_tokens + ask.num_output_tokens <= context_length:
        return ask
    num_output = min(ask.num_output_tokens, max(1, context_length // 2))
    num_prompt = min(ask.num_prompt_tokens, context_length - num_output)
    text = None if ask.text is None else ask.text[: num_prompt * CHARS_PER_TOKEN]
    return replace(ask, num_prompt_tokens=num_prompt, num_output_tokens=num_output, text=text, cut=True)
