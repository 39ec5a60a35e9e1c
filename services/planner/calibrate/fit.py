"""A line through the measured times of steps.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.planner.simulator.cost_model import Shares

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Fit:
    """``prices``: the seconds of each of ``Shares``, none below 0.  The errors are those of the steps that were fitted, as
    shares of what was measured."""

    prices: Shares
    median_error: float
    max_error: float


def fit(steps: Sequence[Shares], seconds: Sequence[float]) -> Fit:
    """The least squares of the relative errors, so that short steps count as much as long ones.  Wants as many steps as
    prices, at least, and all of positive time."""
    matrix, times = np.array(steps), np.array(seconds)
    found = _non_negative(matrix / times[:, None], np.ones_like(times))
    errors = np.abs(matrix @ found / times - 1)
    step_s, token_s, pair_s, sequence_s, context_s = found.tolist()
    prices = (step_s, token_s, pair_s, sequence_s, context_s)
    return Fit(prices, float(np.median(errors)), float(errors.max()))


def _non_negative(matrix: Floats, wanted: Floats) -> Floats:
    """What comes out below 0 is left out, and the rest fitted again."""
    kept = list(range(matrix.shape[1]))
    while True:
        part = np.linalg.lstsq(matrix[:, kept], wanted, rcond=None)[0]
        if (part >= 0).all():
            found = np.zeros(matrix.shape[1])
            found[kept] = part
            return found
        del kept[int(part.argmin())]
