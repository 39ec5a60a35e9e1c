"""Watchers of a state, whichever store has it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from services.directory.events import Event, event_nbytes
from services.directory.state import ClusterState

# A response of a watch holds about this much at most, well under the channel's limit.
_MAX_CHANGES_NBYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Changes:
    """What a watcher has to apply next.  ``snapshot``: drop everything before.  ``revision``: where a later watch can
    resume, 0 while a snapshot is not complete."""

    revision: int
    events: Sequence[Event]
    snapshot: bool


class Watchers:
    """All share the state's bounded history as their queue, so a slow one costs no memory.  Owned by one event loop."""

    def __init__(self, state: Callable[[], ClusterState]) -> None:
        """``state`` gives the present one, or raises what is to end a watch."""
        self._state = state
        self._num = 0
        self._closed = False
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return self._num

    def announce(self) -> None:
        """Lets the watchers look; those of now wait on the event that is set, later ones on a new one."""
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Ends all watches, present and future, so that a server that shuts down need not wait for them."""
        self._closed = True
        self.announce()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Looks at each announcement.  The caller sets a deadline."""
        while not holds():
            await self._changed.wait()

    async def follow(self, from_revision: int, heartbeat_s: float) -> AsyncGenerator[Changes, None]:
        """As Store.watch."""
        self._num += 1
        revision = from_revision
        try:
            while not self._closed:
                changed, state = self._changed, self._state()
                events = state.events_since(revision) if revision else None
                is_snapshot = events is None
                if events is None:
                    events = state.snapshot()
                revision = state.revision
                if not events and not is_snapshot:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(heartbeat_s):
                            await changed.wait()
                        continue
                for changes in split(events, revision, is_snapshot):
                    yield changes
        finally:
            self._num -= 1


def split(events: Sequence[Event], revision: int, is_snapshot: bool) -> list[Changes]:
    """At least one part; only the last names the revision that can be resumed from, since the parts of a snapshot mean
    nothing by themselves and the others are applied in one go."""
    parts: list[list[Event]] = [[]]
    nbytes = 0
    for event in events:
        if parts[-1] and nbytes + event_nbytes(event) > _MAX_CHANGES_NBYTES:
            parts.append([])
            nbytes = 0
        parts[-1].append(event)
        nbytes += event_nbytes(event)
    last = len(parts) - 1
    return [Changes(revision if i == last else 0, part, is_snapshot and i == 0) for i, part in enumerate(parts)]
