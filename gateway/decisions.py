"""The gateway's memory of how it routed the last requests."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from gateway.routing import PassedOver, Route

MAX_REQUESTS = 1000


@dataclass(frozen=True, slots=True)
class Refusal:
    """Nobody could serve the request."""

    reason: str
    passed_over: tuple[PassedOver, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """One attempt's: a route, or why there was none.  ``made_s`` is the caller's monotonic clock."""

    outcome: Route | Refusal
    made_s: float
    view_age_s: float


class DecisionBook:
    """Of the last ``max_requests`` requests, all attempts.  About 0.5 KB for each worker and attempt."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self.max_requests = max_requests
        self._by_request: OrderedDict[tuple[str, str], list[Decision]] = OrderedDict()

    def add(self, tenant: str, request_id: str, decision: Decision, *, first: bool) -> None:
        """``first`` begins the request anew, also where a client of the tenant has used its id before."""
        key = tenant, request_id
        if first or key not in self._by_request:
            self._by_request.pop(key, None)
            self._by_request[key] = []
            if len(self._by_request) > self.max_requests:
                self._by_request.popitem(last=False)
        self._by_request[key].append(decision)

    def of(self, tenant: str, request_id: str) -> tuple[Decision, ...]:
        """In order; empty for a request that is not known, not any more, or another tenant's."""
        return tuple(self._by_request.get((tenant, request_id), ()))
