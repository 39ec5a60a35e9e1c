"""Requests whose answers are determined, asked for by several threads while something is done to the cluster."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvferry import Client

NUM_THREADS = 4
MAX_TOKENS = 24
WITHIN_S = 120.0
_WORDS = ("river", "stone", "cloud", "harbour", "winter", "music", "number", "paper", "garden", "silver", "window")


def prompts(count: int, num_words: int, seed: int) -> tuple[str, ...]:
    """No two begin alike, so that each is computed."""
    draw = random.Random(seed)
    return tuple(" ".join(draw.choices(_WORDS, k=num_words)) for _ in range(count))


def answer(client: Client, prompt: str) -> tuple[int, ...]:
    with client.generate(prompt, max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True) as stream:
        return stream.result().token_ids


def answers(client: Client, asked: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {prompt: answer(client, prompt) for prompt in asked}


@dataclass(slots=True)
class Load:
    """What came of it; ``errors`` are what the SDK raised in the end.  Read it after the load has ended."""

    expected: Mapping[str, tuple[int, ...]]
    num_right: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    errors: list[Exception] = field(default_factory=list)

    def assert_undisturbed(self) -> None:
        assert not self.errors, self.errors
        assert not self.wrong, f"other tokens for {self.wrong}"
        assert self.num_right >= NUM_THREADS


@contextmanager
def load(client: Client, expected: Mapping[str, tuple[int, ...]]) -> Iterator[Load]:
    """Runs from entering on until leaving; leaving waits for the requests under way."""
    result, lock, stop = Load(expected), threading.Lock(), threading.Event()

    def ask(number: int) -> None:
        draw = random.Random(number)
        while not stop.is_set():
            prompt = draw.choice(list(expected))
            try:
                right = answer(client, prompt) == expected[prompt]
            except Exception as error:  # whatever it is, the test tells
                result.errors.append(error)
                continue
            with lock:
                if right:
                    result.num_right += 1
                else:
                    result.wrong[prompt[:20]] += 1

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        running = [threads.submit(ask, number) for number in range(NUM_THREADS)]
        try:
            yield result
        finally:
            stop.set()
            _, late = wait(running, WITHIN_S)
        assert not late, f"requests hung for {WITHIN_S} s"
