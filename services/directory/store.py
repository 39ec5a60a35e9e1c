"""Where the directory's state lives, and the store that keeps it in this process."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, Self

import structlog

from services.directory.core import BlockChange, Directory, Event, Worker, event_nbytes
from services.directory.index import DEFAULT_MAX_ENTRIES, Prefix

_log = structlog.stdlib.get_logger(__name__)

# A response of a watch holds about this much at most, well under the channel's limit.
_MAX_CHANGES_NBYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Changes:
    """What a watcher has to apply next.  ``snapshot``: drop everything before.  ``revision``: where a later watch can
    resume, 0 while a snapshot is not complete."""

    revision: int
    events: Sequence[Event]
    snapshot: bool


class Store(Protocol):
    """What the servicer needs of the state.  The methods raise what services.directory.core raises for the same."""

    async def register(self, worker: Worker, ttl_s: float) -> tuple[int, int]:
        """Returns (lease id, revision)."""
        ...

    async def keep_alive(self, lease_id: int, load: bytes) -> float:
        """Returns the lease's time to live in seconds."""
        ...

    async def deregister(self, lease_id: int) -> None: ...

    async def publish_blocks(self, lease_id: int, first_sequence: int, changes: Sequence[BlockChange]) -> int:
        """Returns the number of the block event expected next."""
        ...

    async def longest_prefix(self, hashes: bytes) -> list[tuple[Worker, Prefix]]: ...

    def watch(self, from_revision: int, heartbeat_s: float) -> AsyncGenerator[Changes, None]:
        """Changes after ``from_revision`` for ever, beginning with a snapshot when they are not remembered; without
        events when nothing happened for ``heartbeat_s``.  Ends when the store closes.  A watcher that is so slow that
        history has passed it by gets a snapshot."""
        ...


class MemoryStore:
    """The state in this process's memory, gone with it; workers register and publish again after a restart.

    Leases end on time while entered.  The watchers of one store share its bounded history as their queue, so a slow one
    costs no memory.
    """

    def __init__(self, *, max_events: int = 100_000, max_index_entries: int = DEFAULT_MAX_ENTRIES) -> None:
        # Microseconds since 1970 outrun the revisions of an earlier life; random leases are not those of one.
        self.directory = Directory(
            first_revision=time.time_ns() // 1000,
            lease_ids=itertools.count(secrets.randbits(62) + 1),
            max_events=max_events,
            max_index_entries=max_index_entries,
        )
        self.num_watchers = 0
        self._closed = False
        self._changed = asyncio.Event()
        self._leases_changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._expiry = asyncio.create_task(self._expire_leases(), name="lease expiry")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close_watches()
        self._expiry.cancel()
        with suppress(asyncio.CancelledError):
            await self._expiry

    def close_watches(self) -> None:
        """Ends all watches, present and future, so that a server that shuts down need not wait for them."""
        self._closed = True
        self._announce()

    async def register(self, worker: Worker, ttl_s: float) -> tuple[int, int]:
        lease_id = self.directory.register(worker, ttl_s, time.monotonic())
        self._leases_changed.set()
        self._announce()
        return lease_id, self.directory.revision

    async def keep_alive(self, lease_id: int, load: bytes) -> float:
        try:
            return self.directory.keep_alive(lease_id, load, time.monotonic())
        finally:
            self._announce()

    async def deregister(self, lease_id: int) -> None:
        self.directory.deregister(lease_id)
        self._announce()

    async def publish_blocks(self, lease_id: int, first_sequence: int, changes: Sequence[BlockChange]) -> int:
        try:
            return self.directory.publish_blocks(lease_id, first_sequence, changes, time.monotonic())
        finally:
            self._announce()

    async def longest_prefix(self, hashes: bytes) -> list[tuple[Worker, Prefix]]:
        return self.directory.longest_prefix(hashes)

    async def watch(self, from_revision: int, heartbeat_s: float) -> AsyncGenerator[Changes, None]:
        self.num_watchers += 1
        revision = from_revision
        try:
            while not self._closed:
                changed = self._changed
                events = self.directory.events_since(revision) if revision else None
                is_snapshot = events is None
                if events is None:
                    events = self.directory.snapshot()
                revision = self.directory.revision
                if not events and not is_snapshot:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(heartbeat_s):
                            await changed.wait()
                        continue
                for changes in _split(events, revision, is_snapshot):
                    yield changes
        finally:
            self.num_watchers -= 1

    def _announce(self) -> None:
        """Lets the watchers look; those of now wait on the event that is set, later ones on a new one."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _expire_leases(self) -> None:
        while True:
            self._leases_changed.clear()
            next_expiry_s = self.directory.next_expiry_s()
            delay_s = None if next_expiry_s is None else max(0.0, next_expiry_s - time.monotonic())
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._leases_changed.wait()
                continue
            if num_expired := self.directory.expire(time.monotonic()):
                _log.warning("leases ran out", workers=num_expired)
                self._announce()


def _split(events: Sequence[Event], revision: int, is_snapshot: bool) -> list[Changes]:
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
