"""What the HTTP application needs of the gateway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gateway.answer import Outlet
from gateway.tenants import Tenant
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2


class FrontDoor(Protocol):
    """The gateway behind its protocols: admission, routing, and the answer as it comes."""

    @property
    def model(self) -> common_pb2.ModelInfo: ...

    @property
    def ready(self) -> bool:
        """Whether a request would now find workers."""
        ...

    async def generate(self, request: inference_pb2.GenerateRequest, tenant: Tenant, outlet: Outlet) -> None:
        """Sends one Started, chunks, one Finished.  Cancelling it stops the compute; it comes back within a bounded time.
        Raises kvferry.errors.Error, before anything is sent for a request that is refused; its ``metadata["field"]``,
        where present, names the field at fault."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What tokens stand for.  ``text`` shows any token, special ones by name and broken characters as U+FFFD; ``bytes``
    gives exactly what the token adds to the answer, nothing for a special token."""

    text: Callable[[int], str]
    bytes: Callable[[int], bytes]
