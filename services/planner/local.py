"""Workers that a `kvferry serve` on this machine starts and ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kvferry import _supervisor
from kvferry.types import WorkerRole


class LocalReplicas:
    """Replicas (see there) of the supervisor that keeps its logs, and so its socket, in ``folder``.  Of a role that
    shrinks the worker with least to finish goes: it drains first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def count(self, role: WorkerRole) -> int:
        return (await asyncio.to_thread(_supervisor.ask, self._folder)).get(role, 0)

    async def scale(self, role: WorkerRole, count: int) -> None:
        await asyncio.to_thread(_supervisor.ask, self._folder, {role: count})
