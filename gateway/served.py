"""The gateway's memory of how long its last requests were and took: what a plan is made from.  Numbers alone, no text."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MAX_REQUESTS = 20_000


@dataclass(frozen=True, slots=True)
class Served:
    """One that was answered to its end.  ``arrived_s``: by the caller's monotonic clock.  ``itl_p99_s`` and the mean
    ``tpot_s`` are 0 of an answer of one token."""

    tenant: str
    arrived_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    ttft_s: float
    itl_p99_s: float
    tpot_s: float
    total_s: float


class ServedBook:
    """The last ``max_requests`` of all tenants, about 0.3 KB each, and since when it holds all."""

    def __init__(self, now_s: float, max_requests: int = MAX_REQUESTS) -> None:
        self._served: deque[Served] = deque(maxlen=max_requests)
        self._since_s = now_s

    def add(self, served: Served) -> None:
        if len(self._served) == self._served.maxlen:
            self._since_s = max(self._since_s, self._served[0].arrived_s)
        self._served.append(served)

    @property
    def since_s(self) -> float:
        """Of who arrived before, some may be missing."""
        return self._since_s

    def of(self, tenant: str) -> list[Served]:
        """In order of their ends."""
        return [served for served in self._served if served.tenant == tenant]
