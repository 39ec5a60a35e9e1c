"""A request as workers can run it, and what is known of its way.  Values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway.routing import Route
from gateway.tenants import EVERYBODY, Tenant
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class Job:
    """A request whose defaults are all filled in."""

    request_id: str
    prompt: Sequence[int]
    sampling: common_pb2.SamplingParams
    tenant: Tenant = EVERYBODY
    priority: int = 0

    @property
    def cache_salt(self) -> bytes:
        return self.tenant.cache_salt

    def behind(self, sent: Sequence[int]) -> Job:
        """What is left of it when ``sent`` has been answered: the same tokens come next."""
        if not sent:
            return self
        sampling = common_pb2.SamplingParams()
        sampling.CopyFrom(self.sampling)
        sampling.max_tokens -= len(sent)
        return replace(self, prompt=[*self.prompt, *sent], sampling=sampling)


@dataclass(slots=True)
class Trace:
    """What is known of a request's way so far; filled in while it runs."""

    route: Route | None = None
    route_s: float = 0.0
    line_s: float = 0.0  # that the request waited for workers to have room
    committed: worker_pb2.Committed | None = None
    finished: worker_pb2.DecodeFinished | None = None
    num_retries: int = 0
    # By time.monotonic(), of the last attempt.
    opened_s: float | None = None
    ticket_s: float | None = None
