"""Other workers' pools, opened once per owner and kept for as long as the owner lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from kvferry.errors import UnavailableError
from services.runtime.tasks import Tasks
from transport import Path, RegionBusy, RemoteRegion, Transport, TransportError

log = structlog.get_logger(__name__)

T = TypeVar("T")

MAX_OPENING = 64  # peers that do not answer, at once


@dataclass(frozen=True, slots=True)
class Owner:
    """Of a region; of a worker of several ranks, each has one."""

    worker_id: str
    incarnation: int
    rank: int = 0


@dataclass(slots=True, eq=False)
class _Opened:
    opening: asyncio.Task[RemoteRegion]
    num_users: int = 0
    stale: bool = False
    closing: bool = False


@dataclass(slots=True, eq=False)
class Remotes:
    """Opening and closing may block while a peer does not answer, so both run on threads, and on others than the loop's
    own few: nobody else waits for it.  Owned by the event loop."""

    transport: Transport
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(MAX_OPENING, "open-pool"))
    _opened: dict[Owner, _Opened] = field(default_factory=dict)
    _closing: Tasks = field(default_factory=Tasks)

    async def acquire(self, owner: Owner, descriptor: bytes) -> RemoteRegion:
        """The owner's pool; give it back with ``release``.  Raises UnavailableError."""
        for other in [o for o in self._opened if o.worker_id == owner.worker_id and o.incarnation != owner.incarnation]:
            self.forget(other)  # an earlier process of that name
        entry = self._opened.get(owner) or self._open(owner, descriptor)
        entry.num_users += 1
        try:
            return await asyncio.shield(entry.opening)
        except BaseException as e:
            self._leave(owner, entry)
            if isinstance(e, TransportError):
                what = f"the pool of {owner.worker_id} cannot be reached: {e}"
                raise UnavailableError(what, reason="OWNER_LOST") from e
            raise

    def _open(self, owner: Owner, descriptor: bytes) -> _Opened:
        opening = asyncio.create_task(self._on_thread(self.transport.open, descriptor))
        entry = self._opened[owner] = _Opened(opening)

        def opened(task: asyncio.Task[RemoteRegion]) -> None:
            if task.cancelled() or task.exception() is not None:  # nobody may come upon it later
                entry.stale = True
                self._close_if_unused(owner, entry)
            elif task.result().path is Path.RMA:
                log.warning("pool_not_mapped", owner=owner.worker_id, why=task.result().why_not_mapped)
            else:
                log.info("pool_opened", owner=owner.worker_id, path=task.result().path)

        opening.add_done_callback(opened)
        return entry

    def release(self, owner: Owner) -> None:
        """One user less.  The region stays open, for the next ticket, unless it was forgotten."""
        entry = self._opened.get(owner)
        if entry is not None:
            self._leave(owner, entry)

    def forget(self, owner: Owner) -> None:
        """The owner is gone: closes its region once nobody uses it."""
        entry = self._opened.get(owner)
        if entry is not None:
            entry.stale = True
            self._close_if_unused(owner, entry)

    def is_unmapped(self, owner: Owner) -> bool:
        """Whether the owner's pool is open already, and by another way than mapped memory."""
        entry = self._opened.get(owner)
        if entry is None or not entry.opening.done() or entry.opening.cancelled() or entry.opening.exception():
            return False
        return entry.opening.result().path is Path.RMA

    async def close(self) -> None:
        """Lets go of all regions; nobody may be using one."""
        for owner in list(self._opened):
            self.forget(owner)
        await self._closing.ended()
        self._threads.shutdown(wait=False)

    async def _on_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    def _leave(self, owner: Owner, entry: _Opened) -> None:
        entry.num_users -= 1
        self._close_if_unused(owner, entry)

    def _close_if_unused(self, owner: Owner, entry: _Opened) -> None:
        if not entry.stale or entry.num_users or entry.closing:
            return
        entry.closing = True
        if self._opened.get(owner) is entry:
            del self._opened[owner]
        self._closing.spawn(self._close(entry))

    async def _close(self, entry: _Opened) -> None:
        try:
            await self._on_thread((await entry.opening).close)
        except RegionBusy:
            log.error("region_busy")  # a user let go before its last write had ended: our bug
        except Exception:
            log.debug("never_opened", exc_info=True)  # whoever waited for it was told
