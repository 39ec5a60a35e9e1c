"""How many workers of a role there are, and the seam to whoever starts and ends them."""

from __future__ import annotations

from typing import Protocol

from kvferry.types import WorkerRole


class Replicas(Protocol):
    async def count(self, role: WorkerRole) -> int:
        """How many are wanted now; those that still start count, those that drain do not.  Raises kvferry.Error."""

    async def scale(self, role: WorkerRole, count: int) -> None:
        """Brings their number to ``count``, or as near as may be in one step; call again for the rest.  Those that go
        finish what they have.  The same call twice does the same.  Returns without waiting for workers.  Raises
        kvferry.Error."""
