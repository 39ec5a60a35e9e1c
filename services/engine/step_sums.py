"""Sums over the steps of an engine in service, from which what each thing in a step costs can be fitted.  Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from services.engine.phases import Piece

# What a step's seconds are made of: the step, its prompt tokens, pairs of a prompt token and one that it attends to,
# sequences that decode, and tokens of their context.
Shares = tuple[float, float, float, float, float]
NUM_SHARES = 5
NUM_PRODUCTS = NUM_SHARES * (NUM_SHARES + 1) // 2
NUM_SCATTER = 4
# A step counts as if at least one in so many parts of what it took had been expected, lest one that was stopped is all that
# counts.
MOST_DELAY = 10.0


class StepSums:
    """Since start, so that the difference of two looks is what happened between them.  With x the shares of a step that
    took t where e was expected: ``seconds`` sums t, ``shares`` x, ``ratios`` w x t / e², ``products`` the upper triangle,
    row by row, of w times the outer product of x/e with itself, and ``squares`` w (t/e)².  So a step counts by what such
    steps take: by what it took itself, those that were not delayed would count most, and a fit would be too low.  And it
    counts w times, once and for each sequence that decodes in it: where steps of many take longer than a line through
    those of few has it, many have long gaps.  ``scatter``, of steps that decode and nothing else: how many, the seconds
    that they took themselves, and the sums of ln(t/e), of these, and of its square."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.shares = [0.0] * NUM_SHARES
        self.ratios = [0.0] * NUM_SHARES
        self.products = [0.0] * NUM_PRODUCTS
        self.squares = 0.0
        self.scatter = [0.0] * NUM_SCATTER

    def observe(
        self, prefill: Iterable[Piece], decode: Iterable[Piece], elapsed_s: float, expected_s: float | None = None
    ) -> None:
        """``elapsed_s`` and ``expected_s`` are positive; None: nobody knows yet what to expect."""
        shares = shares_of(prefill, decode)
        expected_s = elapsed_s if expected_s is None else max(expected_s, elapsed_s / MOST_DELAY)
        late, weight = elapsed_s / expected_s, shares[0] + shares[3]
        self.seconds += elapsed_s
        self.squares += weight * late * late
        ratios = [share / expected_s for share in shares]
        at = 0
        for i, ratio in enumerate(ratios):
            self.shares[i] += shares[i]
            self.ratios[i] += weight * ratio * late
            for other in ratios[i:]:
                self.products[at] += weight * ratio * other
                at += 1

    def observe_decode(self, elapsed_s: float, expected_s: float) -> None:
        """Of a step that decodes alone.  Both are positive."""
        deviation = math.log(elapsed_s / expected_s)
        for i, value in enumerate((1.0, elapsed_s, deviation, deviation * deviation)):
            self.scatter[i] += value


def shares_of(prefill: Iterable[Piece], decode: Iterable[Piece]) -> Shares:
    tokens = pairs = sequences = context = 0.0
    for piece in prefill:
        tokens += piece.num_new
        pairs += piece.num_new * (piece.context - piece.num_new / 2)
    for piece in decode:
        sequences += 1
        context += piece.context
    return (1.0, tokens, pairs, sequences, context)
