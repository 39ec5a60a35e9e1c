"""The gateway's memory of the last requests that have ended."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from kvferry.api.inference.v1 import inference_pb2

MAX_REQUESTS = 500


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """``ended_s``: by the caller's monotonic clock.  ``finished`` is None of a request that did not come to its end, whose
    ``outcome`` says why."""

    request_id: str
    outcome: str
    ended_s: float
    num_prompt_tokens: int
    finished: inference_pb2.Finished | None


class RecentRequests:
    """The last ``max_requests`` of all tenants, each to be seen by its own."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self.max_requests = max_requests
        self._ended: OrderedDict[tuple[str, str], EndedRequest] = OrderedDict()

    def add(self, tenant: str, ended: EndedRequest) -> None:
        """In the place of one of the tenant's that had the same id."""
        self._ended.pop((tenant, ended.request_id), None)
        self._ended[tenant, ended.request_id] = ended
        if len(self._ended) > self.max_requests:
            self._ended.popitem(last=False)

    def of(self, tenant: str, limit: int) -> list[EndedRequest]:
        """The newest first."""
        return list(islice(self._of(tenant), limit))

    def get(self, tenant: str, request_id: str) -> EndedRequest | None:
        """None for one that is not known, not any more, or another tenant's."""
        return self._ended.get((tenant, request_id))

    def _of(self, tenant: str) -> Iterator[EndedRequest]:
        return (ended for (owner, _), ended in reversed(self._ended.items()) if owner == tenant)
