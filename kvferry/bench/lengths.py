"""How long prompts and answers are, in tokens.  Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from kvferry.errors import InvalidRequestError

Draw = Callable[[random.Random], int]
FORMS = "N, uniform:LOW:HIGH, normal:MEAN:DEVIATION or lognormal:MEDIAN:SIGMA"


def parse(text: str) -> Draw:
    """One of ``FORMS``; what is drawn is at least 1.  Raises InvalidRequestError."""
    try:
        return _parse(text)
    except (ValueError, TypeError):
        raise InvalidRequestError(f"{text!r} is no length; write {FORMS}") from None


def _parse(text: str) -> Draw:
    kind, *rest = text.split(":")
    if not rest:
        fixed = int(kind)
        if fixed < 1:
            raise ValueError
        return lambda _: fixed
    first, second = map(float, rest)
    if not (math.isfinite(first) and math.isfinite(second) and first >= 1 and second >= 0):
        raise ValueError
    if kind == "uniform" and first <= second:
        low, high = int(first), int(second)
        return lambda drawn: drawn.randint(low, high)
    if kind == "normal":
        return lambda drawn: max(1, round(drawn.gauss(first, second)))
    if kind == "lognormal":
        return lambda drawn: max(1, round(drawn.lognormvariate(math.log(first), second)))
    raise ValueError
