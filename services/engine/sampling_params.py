"""What a draw depends on and what it yields; no torch here, so schedulers and servicers can speak of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence's tokens are drawn.  ``temperature`` 0 is greedy, ``top_k`` 0 and ``top_p`` 1 are off;
    ``num_logprobs`` None asks for none, 0 for the drawn token's alone.  ``seed`` is any unsigned 64-bit number."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    num_logprobs: int | None = None


class Sample(NamedTuple):
    """The token at ``position`` is to be drawn, from the logits of the token before it: number ``row`` of its batch.
    ``draft``, where it is given, was guessed for it, and the next sample is the one behind the draft."""

    row: int
    sampling: Sampling
    position: int
    draft: int | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """One drawn token.  Log-probabilities are natural logarithms of the distribution before temperature, top_k and
    top_p; ``top`` holds (token id, logprob), likeliest first."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class DrawFailed:
    """No token could be drawn for one sequence; the others of its batch are well."""

    message: str
