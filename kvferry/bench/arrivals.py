"""When requests are sent, in seconds from the load's start.  Pure, and the same for the same seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator

from kvferry.errors import InvalidRequestError


def constant(rate: float) -> Iterator[float]:
    """Endless, ``rate`` a second, the first after one gap."""
    _check_positive("rate", rate)
    return (number / rate for number in itertools.count(1))


def gamma(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Endless, ``rate`` a second on average.  Gaps are gamma distributed, of shape 1 / ``burstiness``, which is their
    squared coefficient of variation: 1 is a Poisson process, more comes in bursts, less is more even."""
    _check_positive("rate", rate)
    _check_positive("burstiness", burstiness)
    drawn = random.Random(f"arrivals {seed}")
    shape, scale = 1 / burstiness, burstiness / rate
    return itertools.accumulate(drawn.gammavariate(shape, scale) for _ in itertools.count())


def scaled(at_s: Iterable[float], speed: float) -> Iterator[float]:
    """A trace's own times from its first on, ``speed`` times as fast."""
    _check_positive("speed", speed)
    times = iter(at_s)
    first = next(times, None)
    if first is None:
        return
    yield 0.0
    for at in times:
        yield (at - first) / speed


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise InvalidRequestError(f"{name} must be a number above 0, not {value}")
