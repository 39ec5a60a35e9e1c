"""The store that is this process's memory."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Self

import structlog

from services.directory.core import Directory
from services.directory.events import BlockChange, Worker
from services.directory.index import DEFAULT_MAX_ENTRIES, Prefix
from services.directory.state import ClusterState
from services.directory.watching import Changes, Watchers

_log = structlog.stdlib.get_logger(__name__)

# How often this process looks at the time.  After a longer pause it hung, and nobody could renew a lease.
_LOOK_S = 0.5
_MAX_PAUSE_S = 2.5


class MemoryStore:
    """A Store that is gone with the process; workers register and publish again after a restart.  Always available."""

    def __init__(self, *, max_events: int = 100_000, max_index_entries: int = DEFAULT_MAX_ENTRIES) -> None:
        # Microseconds since 1970 outrun the revisions of an earlier life; random leases are not those of one.
        self._state = ClusterState(time.time_ns() // 1000, max_events=max_events, max_index_entries=max_index_entries)
        self.directory = Directory(self._state, itertools.count(secrets.randbits(62) + 1))
        self.watchers = Watchers(lambda: self._state)
        self._leases_changed = asyncio.Event()
        self._looked_s = time.monotonic()

    @property
    def state(self) -> ClusterState:
        return self._state

    async def __aenter__(self) -> Self:
        self._expiry = asyncio.create_task(self._expire_leases(), name="lease expiry")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.watchers.close()
        self._expiry.cancel()
        with suppress(asyncio.CancelledError):
            await self._expiry

    async def register(self, worker: Worker, ttl_s: float) -> tuple[int, int]:
        lease_id = self.directory.register(worker, ttl_s, self._now_s())
        self._leases_changed.set()
        self.watchers.announce()
        return lease_id, self._state.revision

    async def keep_alive(self, lease_id: int, load: bytes) -> float:
        try:
            return self.directory.keep_alive(lease_id, load, self._now_s())
        finally:
            self.watchers.announce()

    async def deregister(self, lease_id: int) -> None:
        self.directory.deregister(lease_id)
        self.watchers.announce()

    async def publish_blocks(self, lease_id: int, first_sequence: int, changes: Sequence[BlockChange]) -> int:
        try:
            return self.directory.publish_blocks(lease_id, first_sequence, changes, self._now_s())
        finally:
            self.watchers.announce()

    async def longest_prefix(self, hashes: bytes) -> list[tuple[Worker, Prefix]]:
        return self._state.longest_prefix(hashes)

    def watch(self, from_revision: int, heartbeat_s: float) -> AsyncGenerator[Changes, None]:
        return self.watchers.follow(from_revision, heartbeat_s)

    async def availability(self) -> AsyncGenerator[bool, None]:
        yield True

    def _now_s(self) -> float:
        now_s = time.monotonic()
        if now_s - self._looked_s > _MAX_PAUSE_S:
            _log.warning("this process hung; leases are given their whole time again", seconds=now_s - self._looked_s)
            self.directory.renew_all(now_s)
        self._looked_s = now_s
        return now_s

    async def _expire_leases(self) -> None:
        while True:
            self._leases_changed.clear()
            now_s = self._now_s()
            if num_expired := self.directory.expire(now_s):
                _log.warning("leases ran out", workers=num_expired)
                self.watchers.announce()
            next_expiry_s = self.directory.next_expiry_s()
            delay_s = _LOOK_S if next_expiry_s is None else min(_LOOK_S, max(0.0, next_expiry_s - now_s))
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._leases_changed.wait()
