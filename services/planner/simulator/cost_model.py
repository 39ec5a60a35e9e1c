"""How long workers compute and move bytes.  Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from services.engine.scheduler import Plan
from services.engine.step_sums import Shares

# Delays are no more than so much of what a step takes: something is its own.
MOST_SPREAD = 0.95
# How many a short step has on the average: the fewer, the more steps have none and the further the others are delayed.
NUM_DELAYS = 0.5


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds: of a step, of each prompt token in it, of each pair of a prompt token and one that it attends to, of each
    sequence that decodes and each token of its context; of a message to another worker and back.  ``spread``: share of
    what a step takes on the average that is delays; in service they vary by what else runs there."""

    step_s: float
    prefill_token_s: float
    attention_pair_s: float
    decode_sequence_s: float
    decode_context_token_s: float
    round_trip_s: float
    transfer_bytes_per_s: float
    spread: float = 0.0

    def plan_s(self, plan: Plan) -> float:
        prices = (self.step_s, self.prefill_token_s, self.attention_pair_s, self.decode_sequence_s,
                  self.decode_context_token_s)  # fmt: skip
        return sum(
            n * s for n, s in zip(shares((len(e.token_ids), e.start) for e in plan.entries), prices, strict=True)
        )

    def scattered_s(self, mean_s: float, random: Random) -> float:
        """What a step takes that takes ``mean_s`` on the average: something at least, and delays on top."""
        if not self.spread or not mean_s or not self.step_s:
            return mean_s
        return mean_s * (1 + min(self.spread, MOST_SPREAD) * (delay(self.step_s, mean_s, random.gauss()) - 1))

    def transfer_s(self, num_bytes: int) -> float:
        """Two messages and back, and the bytes: from the last chunk's end to the answer to the commit, or, where cached
        blocks are read, to pin them, read them and release the pin."""
        return 2 * self.round_trip_s + num_bytes / self.transfer_bytes_per_s


def delay(step_s: float, mean_s: float, normal: float) -> float:
    """What a step of ``mean_s`` is delayed, over what such steps are on the average, for a draw from the standard normal
    distribution.  Delays come at any time: their sum is a gamma's, of a shape that is how many come in a step, here by
    Wilson and Hilferty (PNAS 1931)."""
    times = 1 / (9 * NUM_DELAYS * max(1.0, mean_s / step_s))
    return max(0.0, 1 - times + normal * math.sqrt(times)) ** 3


def shares(entries: Iterable[tuple[int, int]]) -> Shares:
    """``entries``: (number of tokens, position of the first) of each sequence of a step.  One token decodes."""
    tokens = pairs = sequences = context = 0.0
    for count, start in entries:
        if count == 1:
            sequences += 1
            context += start + 1
        else:
            tokens += count
            pairs += count * (start + count / 2)
    return (1.0, tokens, pairs, sequences, context)
