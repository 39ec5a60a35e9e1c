"""Where the directory's state lives."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Protocol, Self

from services.directory.events import BlockChange, Worker
from services.directory.index import Prefix
from services.directory.state import ClusterState
from services.directory.watching import Changes, Watchers


class StoreAwayError(Exception):
    """The store cannot be reached, or has yet to be read.  Nothing was changed that a second attempt would not repair."""


class Store(Protocol):
    """What the service needs of the state.  The calls raise what services.directory.core raises for the same, and
    StoreAwayError.  Leases end on time while entered; leaving ends the watches first."""

    @property
    def watchers(self) -> Watchers: ...

    @property
    def state(self) -> ClusterState | None:
        """To be read, not changed; None while there is none."""
        ...

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
        events when nothing happened for ``heartbeat_s``.  Ends when the store closes, with StoreAwayError when it is away.
        A watcher that is so slow that history has passed it by gets a snapshot."""
        ...

    def availability(self) -> AsyncGenerator[bool, None]:
        """Whether calls are answered: now, and at each change."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
