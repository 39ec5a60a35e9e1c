"""A host tier's memory beside a pool that is itself the host's: plain memory, which no peer reaches."""

from __future__ import annotations

from collections.abc import Sequence

from transport.segments import make_segment
from transport.ucp import Memory, stream


class HostCopier:
    """See ``Copier``.  Threads that compute lose the memory's bandwidth to it, and no cache."""

    def __init__(self, pool: Memory, block_nbytes: int, num_slots: int) -> None:
        """All pages of the slots are there when it returns.  Raises OutOfMemory."""
        self._pool = pool
        self._nbytes = block_nbytes
        self._slots = make_segment(num_slots * block_nbytes, incarnation=0)  # which no peer is told of

    def down(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        stream(self._slots, self._pool, self._offsets(slots), self._offsets(blocks), self._nbytes)

    def up(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        stream(self._pool, self._slots, self._offsets(blocks), self._offsets(slots), self._nbytes)

    def _offsets(self, numbers: Sequence[int]) -> list[int]:
        return [number * self._nbytes for number in numbers]
