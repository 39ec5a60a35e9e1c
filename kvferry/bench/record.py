"""What became of one request.  Pure; all times are seconds from the load's start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """``token_at_s`` has each token's arrival; tokens that shared a message have the same.  ``error`` is a stable word, or
    None for a whole answer, and ``said`` a sentence about it.  ``refused``: the other side had too much in flight.
    ``cut``: it was longer than the context, and less was asked."""

    scheduled_s: float
    sent_s: float
    end_s: float
    num_prompt_tokens: int
    token_at_s: tuple[float, ...]
    error: str | None = None
    refused: bool = False
    cut: bool = False
    said: str = ""

    @property
    def ttft_s(self) -> float | None:
        return self.token_at_s[0] - self.scheduled_s if self.token_at_s else None

    @property
    def second_token_s(self) -> float | None:
        return self.token_at_s[1] - self.scheduled_s if len(self.token_at_s) > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.token_at_s, self.token_at_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        num_gaps = len(self.token_at_s) - 1
        return (self.token_at_s[-1] - self.token_at_s[0]) / num_gaps if num_gaps > 0 else None

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.scheduled_s


def percentile(ordered: Sequence[float], rank: float) -> float:
    """Of ascending values, at least one, interpolated linearly between neighbours as numpy does by default."""
    place = (len(ordered) - 1) * rank / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    # Never outside its neighbours, which a sum of products can be by a bit.
    return min(ordered[above], ordered[below] + (ordered[above] - ordered[below]) * (place - below))
