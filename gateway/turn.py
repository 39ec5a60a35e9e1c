"""Streams that have something to send, until the loop has read what there is to read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Turn:
    """Calls together, once the loop has done what was ready before: what comes for a stream in the meantime leaves in one
    message, and what leaves for a client's streams in one write.  Owned by the event loop."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def add(self, act: Callable[[], None]) -> None:
        """``act`` is called once, soon, and must not raise."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._go)
        self._due.append(act)

    def _go(self) -> None:
        due, self._due = self._due, []
        for act in due:
            act()
