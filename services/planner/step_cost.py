"""How long a worker's step takes, as sums over what the step holds.  Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.planner.simulator.cost_model import CostModel

# A step's: always 1; prompt tokens; pairs of a prompt token and one that it attends to; context of prompt chunks, chunk
# included; sequences that decode; their context.
Terms = tuple[float, float, float, float, float, float]
NOTHING: Terms = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds for one of each term: a step takes ``additive`` and the longer of ``compute`` and ``memory``, which is the
    roofline.  ``expert_s`` more of memory for reading all routed experts, of which ``rows`` tokens touch the share
    1 - exp(-``expert_rate`` * rows).  ``spread``: see ``CostModel``; what is told here is the mean."""

    additive: Terms = NOTHING
    compute: Terms = NOTHING
    memory: Terms = NOTHING
    expert_s: float = 0.0
    expert_rate: float = 0.0
    spread: float = 0.0

    def parts(self, terms: Terms) -> tuple[float, float, float]:
        """Seconds: additive, compute, memory."""
        additive, compute, memory = (
            sum(price * count for price, count in zip(prices, terms, strict=True))
            for prices in (self.additive, self.compute, self.memory)
        )
        return additive, compute, memory + self.expert_s * -math.expm1(-self.expert_rate * (terms[1] + terms[4]))

    def step_s(self, terms: Terms) -> float:
        additive, compute, memory = self.parts(terms)
        return additive + max(compute, memory)


def calibrated(costs: CostModel) -> StepCost:
    """Of step times that were measured."""
    return StepCost(
        additive=(
            costs.step_s, costs.prefill_token_s, costs.attention_pair_s, 0.0, costs.decode_sequence_s,
            costs.decode_context_token_s,
        ),
        spread=costs.spread,
    )  # fmt: skip


def chunk(num_tokens: float, start: float = 0.0) -> Terms:
    """A step of one prompt's ``num_tokens`` from position ``start`` on."""
    return (1.0, num_tokens, num_tokens * (start + num_tokens / 2), start + num_tokens, 0.0, 0.0)


def batch(num_sequences: float, context: float) -> Terms:
    """A step in which so many sequences decode, of ``context`` tokens each."""
    return (1.0, 0.0, 0.0, 0.0, num_sequences, num_sequences * context)
