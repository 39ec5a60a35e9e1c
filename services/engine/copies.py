"""Copies between a pool and its host tier, made by a thread of their own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from services.engine.host_tier import Copy, Direction

log = structlog.get_logger(__name__)

CLOSE_TIMEOUT_S = 5.0
# What a copy up weighs when so many more have been made.
HALF_LIFE_LOADS = 20
_KEEP = 0.5 ** (1 / HALF_LIFE_LOADS)


class Copier(Protocol):
    """Owns the memory of the slots.  One thread calls it; each call blocks until every byte is in place, and sees what was
    asked of the device before it began.  Raises what the copy failed with, when nothing more of it is read or written."""

    def down(self, blocks: Sequence[int], slots: Sequence[int]) -> None: ...

    def up(self, slots: Sequence[int], blocks: Sequence[int]) -> None: ...


class CopyThread:
    """Copies up go before copies down, for sequences wait for them.  ``loaded_bytes_per_s``: of copies up, from their being
    asked for to their end; newer ones weigh more, 0 until there was one.  Use as a context manager."""

    def __init__(self, copier: Copier, block_nbytes: int) -> None:
        self._copier = copier
        self._block_nbytes = block_nbytes
        self._queues: dict[Direction, deque[_Asked]] = {Direction.UP: deque(), Direction.DOWN: deque()}
        self._changed = threading.Condition()
        self._stopping = False
        self._bytes = self._busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="host copies", daemon=True)

    def __enter__(self) -> CopyThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends after the copy under way; those that wait are dropped, and never told of.  Blocks, at most
        ``CLOSE_TIMEOUT_S``: the thread is a daemon."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(CLOSE_TIMEOUT_S)

    @property
    def loaded_bytes_per_s(self) -> float:
        return self._bytes / self._busy_s if self._busy_s > 0 else 0.0

    def start(self, copy: Copy, done: Callable[[Copy, bool], None]) -> None:
        """Returns at once; ``done`` is called on the copies' thread, with whether it was made.  The host tier bounds how
        many there are."""
        with self._changed:
            self._queues[copy.direction].append((copy, done, time.monotonic()))
            self._changed.notify()

    def _run(self) -> None:
        while (asked := self._next()) is not None:
            copy, done, asked_s = asked
            try:
                if copy.direction is Direction.UP:
                    self._copier.up(copy.slots, copy.blocks)
                    self._bytes = self._bytes * _KEEP + len(copy.blocks) * self._block_nbytes
                    self._busy_s = self._busy_s * _KEEP + time.monotonic() - asked_s
                else:
                    self._copier.down(copy.blocks, copy.slots)
                ok = True
            except Exception:  # what was to come is computed
                log.exception("host_copy_failed", direction=copy.direction.name.lower(), blocks=len(copy.blocks))
                ok = False
            done(copy, ok)

    def _next(self) -> _Asked | None:
        with self._changed:
            while not self._stopping:
                for queue in self._queues.values():
                    if queue:
                        return queue.popleft()
                self._changed.wait()
        return None


_Asked = tuple[Copy, Callable[[Copy, bool], None], float]
