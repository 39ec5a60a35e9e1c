"""Paired figures and what they say.  Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

HANDOVER_S = 0.005
HANDOVER_SHARE = 0.02
TTFT_RATIO = 1.03


@dataclass(frozen=True, slots=True)
class Pair:
    """Two requests of equal length, one after the other.  Seconds, all but ``single_s`` of the split one."""

    split_s: float  # time to first token, as the client saw it
    single_s: float
    prefill_s: float
    exposed_s: float
    handover_s: float
    hidden_share: float  # of the bytes

    @property
    def allowed_s(self) -> float:
        """What the handover may take."""
        return max(HANDOVER_S, HANDOVER_SHARE * self.prefill_s)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Holds the median with at least 95 % confidence, whatever the distribution: two order statistics, as far in as the
    sign test lets them; the extremes where there are too few values."""
    n = len(values)
    inside = 0
    while 2 * sum(math.comb(n, k) for k in range(inside + 2)) <= 0.05 * 2**n:
        inside += 1
    ordered = sorted(values)
    return ordered[inside], ordered[n - 1 - inside]


def rows(pairs: Sequence[Pair], num_tokens: int) -> list[dict[str, str | float]]:
    """One for each goal; ratios are medians of the pairs' own, and a goal is the most that its ratio may be."""

    def row(work: str, ours: list[float], peer: list[float], goal: float, unit: str) -> dict[str, str | float]:
        ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
        return {
            "work": f"{work}, {num_tokens} tokens",
            "ours": statistics.median(ours),
            "peer": statistics.median(peer),
            "ratio": ratio,
            "goal": goal,
            "unit": unit,
        }

    handover_ms = [1e3 * pair.handover_s for pair in pairs]
    return [
        row("TTFT split / on one worker", [p.split_s for p in pairs], [p.single_s for p in pairs], TTFT_RATIO, "s"),
        row("last chunk to first decode step / allowed", handover_ms, [1e3 * p.allowed_s for p in pairs], 1.0, "ms"),
    ]
