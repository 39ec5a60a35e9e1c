"""Prices through the measured times of steps.  Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from services.engine.step_sums import NUM_PRODUCTS, NUM_SCATTER, NUM_SHARES, Shares
from services.planner.simulator.cost_model import MOST_SPREAD, NUM_DELAYS, delay

Floats = npt.NDArray[np.float64]

# Of a term against what is left of it beside the others: below, they say the same.
_RANK = 1e-10
_NUM_DRAWS, _HALVINGS = 1000, 30


@dataclass(frozen=True, slots=True)
class Fit:
    """``prices``: the seconds of each of ``Shares``, none below 0.  The errors are those of the steps that were fitted, as
    shares of what was measured."""

    prices: Shares
    median_error: float
    rms_error: float
    max_error: float


def fit(steps: Sequence[Shares], seconds: Sequence[float]) -> Fit:
    """The least squares of the relative errors, so that short steps count as much as long ones.  Wants as many steps as
    prices, at least, and all of positive time."""
    matrix, times = np.array(steps), np.array(seconds)
    ratios, ones = matrix / times[:, None], np.ones_like(times)
    found = _non_negative(lambda kept: np.linalg.lstsq(ratios[:, kept], ones, rcond=None)[0])
    errors = np.abs(matrix @ found / times - 1)
    rms = float(np.sqrt(np.mean(errors**2)))
    return Fit(_shares(found), float(np.median(errors)), rms, float(errors.max()))


@dataclass(frozen=True, slots=True)
class SumsFit:
    """``rms_error``: root of the mean squared error of the steps, each as a share of what was expected of it, and as often
    as it counts in the sums; too small for workers of before, of which each counts once."""

    prices: Shares
    rms_error: float


def fit_sums(
    seconds: float, shares: Sequence[float], ratios: Sequence[float], products: Sequence[float], squares: float
) -> SumsFit:
    """The same from the sums over steps that workers keep (``StepSums``), errors being relative to what was expected, and
    then all prices by what makes the whole time that which was measured: relative errors alone make little of the steps
    that took long.  Raises ValueError of what are no such sums, or none of anything."""
    gram, wanted, total = _gram(products), np.array(ratios), np.array(shares)
    if not (wanted.shape == total.shape == (NUM_SHARES,) and seconds > 0 and (gram.diagonal()[total > 0] > 0).all()):
        raise ValueError("there are no steps in these sums")
    scale = np.sqrt(np.where(total > 0, gram.diagonal(), np.inf))  # what never was costs nothing
    even, target = gram / np.outer(scale, scale), wanted / scale
    found = _non_negative(lambda kept: np.linalg.lstsq(even[np.ix_(kept, kept)], target[kept], rcond=_RANK)[0]) / scale
    found *= seconds / float(found @ total)
    square = float(found @ gram @ found - 2 * found @ wanted + squares) / (total[0] + total[3])
    return SumsFit(_shares(found), max(0.0, square) ** 0.5)


def spread_of(scatter: Sequence[float], found: SumsFit) -> float:
    """The ``CostModel.spread`` with which simulated steps are as far from their mean as the steps that only decoded were
    from those before them, in the logarithm (``StepSums.scatter``), of which one that was stopped for long makes little.
    By the fit's error where that was not told."""
    count, seconds, sum_, squares = scatter or (0.0,) * NUM_SCATTER
    if count < 2 or not found.prices[0]:
        return spread_of_error(found.rms_error)
    wanted = math.sqrt(max(0.0, squares / count - (sum_ / count) ** 2))
    draws = (NormalDist().inv_cdf((n + 0.5) / _NUM_DRAWS) for n in range(_NUM_DRAWS))
    delays = np.array([delay(found.prices[0], seconds / count, normal) for normal in draws])
    low, high = 0.0, MOST_SPREAD
    for _ in range(_HALVINGS):
        spread = (low + high) / 2
        low, high = (spread, high) if np.log1p(spread * (delays - 1)).std() < wanted else (low, spread)
    return high


def spread_of_error(rms_error: float) -> float:
    """With which short steps deviate from their mean by such a share of it, root mean square."""
    return rms_error * math.sqrt(NUM_DELAYS)


def _gram(products: Sequence[float]) -> Floats:
    if len(products) != NUM_PRODUCTS:
        raise ValueError(f"{len(products)} products, not {NUM_PRODUCTS}")
    gram = np.zeros((NUM_SHARES, NUM_SHARES))
    gram[np.triu_indices(NUM_SHARES)] = products
    return gram + gram.T - np.diag(gram.diagonal())


def _non_negative(solve: Callable[[list[int]], Floats]) -> Floats:
    """What comes out below 0 is left out, and the rest fitted again."""
    kept = list(range(NUM_SHARES))
    while True:
        part = solve(kept)
        if (part >= 0).all():
            found = np.zeros(NUM_SHARES)
            found[kept] = part
            return found
        del kept[int(part.argmin())]


def _shares(found: Floats) -> Shares:
    step_s, token_s, pair_s, sequence_s, context_s = found.tolist()
    return (step_s, token_s, pair_s, sequence_s, context_s)
