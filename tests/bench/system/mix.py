"""What the streams ask for: prompts and answers of mixed length.  Pure, and the same for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

PROMPT_TOKENS = (16, 384)
ANSWER_TOKENS = (32, 160)
TOKEN_IDS = (1000, 40000)


@dataclass(frozen=True, slots=True)
class Ask:
    """One stream, to the last of ``num_answer`` tokens; greedy at temperature 0."""

    prompt: tuple[int, ...]
    num_answer: int
    temperature: float
    seed: int


def mix(num_streams: int, seed: int) -> list[Ask]:
    """Prompts are random tokens, so no cache holds any; one stream in four samples, the others are greedy."""
    draw = random.Random(seed)
    asks = []
    for number in range(num_streams):
        length = round(PROMPT_TOKENS[0] * (PROMPT_TOKENS[1] / PROMPT_TOKENS[0]) ** draw.random())
        prompt = tuple(draw.randrange(*TOKEN_IDS) for _ in range(length))
        asks.append(Ask(prompt, draw.randint(*ANSWER_TOKENS), 0.8 * (number % 4 == 3), draw.getrandbits(32)))
    return asks


def num_tokens(asks: list[Ask]) -> int:
    """Of all answers."""
    return sum(ask.num_answer for ask in asks)
