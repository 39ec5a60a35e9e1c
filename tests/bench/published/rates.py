"""The highest rate, and the tightest objectives, that a fleet keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from services.planner.fleet import Fleet, Run, simulate
from services.planner.traffic import Tokens, Traffic

_STEPS = 10


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompts and answers, drawn independently."""

    num_input: Tokens
    num_output: Tokens

    def traffic(self, rate: float, seed: int) -> Traffic:
        """Poisson arrivals.  The same requests in the same order at every rate."""
        random = np.random.default_rng(seed)
        count = len(self.num_input)
        order = random.permutation(count)
        gaps = random.exponential(1 / rate, count)
        return Traffic(
            np.cumsum(gaps) - gaps[0], self.num_input[order].astype(np.int32), self.num_output[order].astype(np.int32),
            np.zeros(count, np.int32),
        )  # fmt: skip


def from_means(mean_input: float, mean_output: float, most: int, spread: float, count: int) -> Lengths:
    """Lognormal, of a standard deviation of ``spread`` means, cut off where prompt and answer reach ``most``."""
    random = np.random.default_rng(0)
    sigma = np.sqrt(np.log1p(spread**2))

    def drawn(mean: float, highest: float) -> Tokens:
        values = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, 40 * count)
        values = values[values < highest][:count]
        # The cut lowers the mean; the paper's is that of what was left.
        return np.clip(np.round(values * mean / values.mean()), 2, highest).astype(np.int32)

    inputs = drawn(mean_input, most - 2)
    return Lengths(inputs, np.minimum(drawn(mean_output, most / 2), np.maximum(2, most - inputs)).astype(np.int32))


def from_quantiles(inputs: Sequence[int], outputs: Sequence[int], ranks: Sequence[float], count: int) -> Lengths:
    random = np.random.default_rng(0)
    drawn = [np.round(np.interp(random.uniform(0, 100, count), ranks, values)) for values in (inputs, outputs)]
    return Lengths(drawn[0].astype(np.int32), np.maximum(2, drawn[1]).astype(np.int32))


def highest_rate(
    fleet: Fleet, lengths: Lengths, keeps: Callable[[Run], bool], most: float, seeds: Sequence[int]
) -> float:
    """The highest, 0 to ``most``, at which most seeds keep, by bisection to 1/1024 of ``most``."""

    def enough(rate: float) -> bool:
        kept = sum(keeps(simulate(fleet, lengths.traffic(rate, seed))) for seed in seeds)
        return 2 * kept > len(seeds)

    low, high = 0.0, most
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if enough(middle):
            low = middle
        else:
            high = middle
    return low


def tightest_scale(run: Run, ttft_s: float, tpot_s: float, share: float) -> float:
    """What both objectives can be multiplied with so that ``share`` of the requests just keep both."""
    worst = np.maximum(run.ttft_s / ttft_s, run.tpot_s / tpot_s)
    return float(np.quantile(worst, share, method="higher"))
