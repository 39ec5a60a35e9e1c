"""The store that several directories share: rules and log in Redis (or Valkey), a copy of the state in each of them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Self

import structlog

from services.directory.core import (
    IncarnationReusedError,
    ReplacedError,
    SequenceGapError,
    SnapshotWantedError,
    UnknownLeaseError,
    check_hashes,
)
from services.directory.events import BlockChange, Worker
from services.directory.index import DEFAULT_MAX_ENTRIES, Prefix
from services.directory.redis_link import MAX_CHANGES, RedisLink, StoreRefusedError
from services.directory.replica import Entry, LogBrokenError, Replica
from services.directory.state import ClusterState
from services.directory.store import StoreAwayError
from services.directory.watching import Changes, Watchers
from services.runtime.backoff import Backoff

_log = structlog.stdlib.get_logger(__name__)

# How often leases are looked at, and the log's head when nothing happens.
_LOOK_S = 0.5
# How long what was written may take to come back by the log.
_ECHO_TIMEOUT_S = 3.0
# Beyond it the store's arithmetic is not exact.
_MAX_SEQUENCE = 1 << 53


class RedisStore:
    """A Store.  While Redis is away, or not read yet, calls and watches end with StoreAwayError; it is tried again for
    ever.  Who registered and what was published is in ``state`` when the call returns."""

    def __init__(
        self, link: RedisLink, *, max_events: int = 100_000, max_index_entries: int = DEFAULT_MAX_ENTRIES
    ) -> None:
        """Takes the link over, and closes it."""
        self._link = link
        self._replica = Replica(
            lambda revision: ClusterState(revision, max_events=max_events, max_index_entries=max_index_entries)
        )
        self._is_open = False
        self._why_away = "the store has yet to be read"
        self._look_due_s = 0.0
        self.watchers = Watchers(self._present)

    @property
    def state(self) -> ClusterState | None:
        return self._replica.state if self._is_open else None

    async def __aenter__(self) -> Self:
        """Raises StoreRefusedError; a store that does not answer is waited for."""
        try:
            await self._link.look()
        except StoreRefusedError:
            await self._link.close()
            raise
        except StoreAwayError as error:
            self._go_away(str(error))
        self._following = asyncio.create_task(self._follow(), name="redis store")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.watchers.close()
        while not self._following.done():
            # Before Python 3.12 a cancellation is lost that comes in the moment in which a command was sent.
            self._following.cancel()
            await asyncio.wait([self._following], timeout=0.1)
        await self._link.close()

    async def register(self, worker: Worker, ttl_s: float) -> tuple[int, int]:
        self._present()
        # Random, so that no lease is one that was lost with the store's data.
        lease_id = secrets.randbits(62) + 1
        match await self._link.register(worker, ttl_s, lease_id):
            case [b"ok", revision]:
                await self._echo(revision)
                return lease_id, int(revision)
            case [b"replaced", present]:
                raise ReplacedError(worker.worker_id, int(present))
            case [b"reused"]:
                raise IncarnationReusedError(worker.worker_id, worker.incarnation)
            case answer:
                raise _unexpected(answer)

    async def keep_alive(self, lease_id: int, load: bytes) -> float:
        self._present()
        match await self._link.keep_alive(lease_id, load):
            case [b"ok", ttl_ms, _]:
                return int(ttl_ms) / 1000
            case [b"unknown"]:
                raise UnknownLeaseError(lease_id)
            case answer:
                raise _unexpected(answer)

    async def deregister(self, lease_id: int) -> None:
        self._present()
        match await self._link.deregister(lease_id):
            case [b"ok", revision]:
                await self._echo(revision)
            case answer:
                raise _unexpected(answer)

    async def publish_blocks(self, lease_id: int, first_sequence: int, changes: Sequence[BlockChange]) -> int:
        self._present()
        check_hashes(changes)
        if first_sequence + len(changes) > _MAX_SEQUENCE:
            raise ValueError(f"first_sequence must be less than {_MAX_SEQUENCE}")
        following = first_sequence
        for start in range(0, max(1, len(changes)), MAX_CHANGES):
            first = first_sequence + start
            match await self._link.publish(lease_id, first, changes[start : start + MAX_CHANGES]):
                case [b"ok", expected, revision]:
                    await self._echo(revision)
                    following = int(expected)
                case [b"unknown"]:
                    raise UnknownLeaseError(lease_id)
                case [b"gap", expected]:
                    raise SequenceGapError(int(expected), first)
                case [b"snapshot"]:
                    raise SnapshotWantedError
                case answer:
                    raise _unexpected(answer)
        return following

    async def longest_prefix(self, hashes: bytes) -> list[tuple[Worker, Prefix]]:
        return self._present().longest_prefix(hashes)

    async def watch(self, from_revision: int, heartbeat_s: float) -> AsyncGenerator[Changes, None]:
        if from_revision > self._present().revision:
            # Another directory may have been faster.
            await self._echo(await self._link.head())
        async with aclosing(self.watchers.follow(from_revision, heartbeat_s)) as changes:
            async for some in changes:
                yield some

    async def availability(self) -> AsyncGenerator[bool, None]:
        while True:
            said = self._is_open
            yield said
            await self.watchers.until(lambda said=said: self._is_open is not said)  # type: ignore[misc]

    def _present(self) -> ClusterState:
        if (state := self.state) is None:
            raise StoreAwayError(self._why_away)
        return state

    async def _echo(self, revision: bytes | int) -> None:
        """Until the copy has come that far."""
        wanted = int(revision)
        try:
            async with asyncio.timeout(_ECHO_TIMEOUT_S):
                await self.watchers.until(lambda: self._present().revision >= wanted)
        except TimeoutError as error:
            raise StoreAwayError(f"revision {wanted} did not come back from the store in time") from error

    async def _follow(self) -> None:
        backoff = Backoff(cap_s=1.0)
        while True:
            try:
                await self._catch_up()
                backoff.reset()
                self._come_back()
                while True:
                    await self._step()
            except LogBrokenError as error:
                _log.warning("the store's log does not lead on from what was read; reading all anew", reason=str(error))
                self._replica.drop()
                self._go_away("the store is being read anew")
            except StoreAwayError as error:
                self._go_away(str(error))
            except Exception:
                # A bug; a directory that could serve again must not stay dead.
                _log.exception("following the store failed; reading all anew")
                self._replica.drop()
                self._go_away("the store could not be read; see this directory's log")
            await asyncio.sleep(backoff.next_s())

    async def _catch_up(self) -> None:
        """Before anything else the leases, that nobody may think ended who could not renew them."""
        await self._look()
        await self._link.check_policy()
        if not self._replica.is_read:
            await self._read()
        head = await self._link.head()
        self._replica.check_head(head)
        await self._reach(head)

    async def _read(self) -> None:
        life = await self._link.life()
        head, workers = await self._link.workers()
        self._replica.begin(head, workers, life)
        for worker in workers:
            async for changes in self._link.blocks(worker.worker_id):
                self._replica.add_blocks(worker.worker_id, changes)
                await asyncio.sleep(0)  # the other calls' turn
        self._replica.complete(await self._link.head(), await self._link.life())

    async def _step(self) -> None:
        """Whatever comes within a look's time, and a look when it is due."""
        if not await self._take(await self._entries(_LOOK_S)):
            head = await self._link.head()
            self._replica.check_head(head)
            await self._reach(head)
        if time.monotonic() >= self._look_due_s:
            await self._look()

    async def _reach(self, head: int) -> None:
        while self._replica.is_behind(head):
            if not await self._take(await self._entries(0.0)):
                raise LogBrokenError(f"the entries up to {head} are gone")

    async def _entries(self, wait_s: float) -> list[Entry]:
        return await self._link.entries_after(self._replica.revision, wait_s)

    async def _take(self, entries: Sequence[Entry]) -> bool:
        """Whether there were any."""
        for entry in entries:
            self._replica.take(entry)
            await asyncio.sleep(0)  # the other calls' turn
        if entries:
            self.watchers.announce()
        return bool(entries)

    async def _look(self) -> None:
        self._look_due_s = time.monotonic() + _LOOK_S
        if num_ended := await self._link.look():
            _log.warning("leases ran out", workers=num_ended)

    def _come_back(self) -> None:
        if not self._is_open:
            self._is_open = True
            _log.info("serving from the store", store=self._link.shown_url, workers=len(self._present().workers))
            self.watchers.announce()

    def _go_away(self, why: str) -> None:
        if self._is_open or why != self._why_away:
            _log.warning("not serving until the store is back", store=self._link.shown_url, reason=why)
        self._is_open, self._why_away = False, why
        self.watchers.announce()


def _unexpected(answer: Any) -> StoreAwayError:
    return StoreAwayError(f"the store's answer is not known to this version: {answer!r:.200}")
