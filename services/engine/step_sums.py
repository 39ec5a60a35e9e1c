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


class StepSums:
    """Since start, so that the difference of two looks is what happened between them.  With x the shares of a step that
    took t: ``seconds`` sums t, ``shares`` x, ``ratios`` x/t, and ``products`` the upper triangle, row by row, of the
    outer product of x/t with itself.  ``scatter``, of steps that decode and nothing else: how many, the seconds they took,
    and the sums of ln(t / what was expected) and of its square."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.shares = [0.0] * NUM_SHARES
        self.ratios = [0.0] * NUM_SHARES
        self.products = [0.0] * NUM_PRODUCTS
        self.scatter = [0.0] * NUM_SCATTER

    def observe(self, prefill: Iterable[Piece], decode: Iterable[Piece], elapsed_s: float) -> None:
        """``elapsed_s`` is positive."""
        shares = shares_of(prefill, decode)
        self.seconds += elapsed_s
        ratios = [share / elapsed_s for share in shares]
        at = 0
        for i, ratio in enumerate(ratios):
            self.shares[i] += shares[i]
            self.ratios[i] += ratio
            for other in ratios[i:]:
                self.products[at] += ratio * other
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
