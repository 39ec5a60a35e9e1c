"""What a request must keep to count as good, and the highest rate at which enough of them do.  Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvferry.bench.record import Record, percentile
from kvferry.errors import InvalidRequestError

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds; None bounds nothing.  ``ttft`` and ``e2e`` count from the scheduled send, ``itl`` is the 99th percentile
    of the request's own gaps between tokens, ``tpot`` their mean."""

    ttft: float | None = None
    itl: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def is_met_by(self, record: Record) -> bool:
        """Never by a request that failed."""
        if record.error is not None:
            return False
        gaps = sorted(record.gaps_s)
        return self.are_met(record.ttft_s, percentile(gaps, 99) if gaps else None, record.tpot_s, record.e2e_s)

    def are_met(self, ttft_s: float | None, itl_p99_s: float | None, tpot_s: float | None, e2e_s: float) -> bool:
        """By an answer; None is what it was too short for."""
        found = ((self.ttft, ttft_s), (self.itl, itl_p99_s), (self.tpot, tpot_s), (self.e2e, e2e_s))
        return all(bound is None or value is None or value <= bound for bound, value in found)


def parse(text: str) -> Slo:
    """Such as ``ttft=500ms,itl=50ms``.  Raises InvalidRequestError."""
    bounds: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(ttft|itl|tpot|e2e)=(\d+(?:\.\d+)?)(us|ms|s)\s*", part)
        if match is None or match[1] in bounds:
            raise InvalidRequestError(
                f"{part!r} is no objective; write ttft, itl, tpot or e2e, each once, with a unit: ttft=500ms,itl=50ms"
            )
        bounds[match[1]] = float(match[2]) * _UNITS_S[match[3]]
    return Slo(**bounds)


class RateSearch:
    """Doubles until a rate fails, then halves the interval.  Try ``rate``, tell the outcome, until ``done``.

    ``best`` is None while no rate was good."""

    def __init__(self, start: float, *, precision: float = 0.1, max_trials: int = 12) -> None:
        self.rate = start
        self.best: float | None = None
        self.done = False
        self._failed: float | None = None
        self._precision = precision
        self._left = max_trials

    def tell(self, good: bool) -> None:
        self._left -= 1
        if good:
            self.best = self.rate
        else:
            self._failed = self.rate
        if self._failed is None:
            self.rate *= 2
        elif self.best is None:
            self.rate /= 2
        else:
            self.done = self._failed - self.best <= self._precision * self._failed
            self.rate = (self._failed + self.best) / 2
        self.done = self.done or self._left == 0
