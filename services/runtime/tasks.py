"""Tasks that nobody awaits at once; an event loop alone would let them be collected before they end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    """Owned by the event loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def cancel(self) -> None:
        for task in self._running:
            task.cancel()

    async def stop(self) -> None:
        """Cancels all, those too that are spawned in the meantime, and returns once they have ended."""
        while self._running:
            self.cancel()
            await asyncio.wait(self._running)

    async def ended(self) -> None:
        """Also those that are spawned in the meantime.  Whoever wants a task's outcome awaits the task."""
        while self._running:
            await asyncio.wait(self._running)
