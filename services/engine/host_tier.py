"""What a host's memory keeps of the blocks that one pool evicts.  Pure accounting: calls in, copies to be made out.

Every slot is in exactly one state, and free + filling + held = total at every instant:

    FREE     nothing's
    FILLING  a copy from the pool is under way
    HELD     holds the block of a hash; evicted when it is the least recently used and no copy reads it

Blocks are copied down ahead of need, so eviction waits for nothing: first those that the pool would evict next, then
those that are still in use, the oldest first, for a pool that is full of these evicts them as soon as they are released.
A block that is evicted while it is copied is overwritten under the copy, whose result then does not count: whether the
block kept its content throughout is asked when the copy has ended.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from services.engine.blocks import BlockPool, CacheChange, Content
from services.runtime.tier import Tier

# Blocks in one copy down: who waits for a copy up waits for one of these at most.
MAX_SAVED_AT_ONCE = 32


class Direction(Enum):
    DOWN = auto()  # from the pool to the host
    UP = auto()


@dataclass(frozen=True, slots=True)
class Copy:
    """``blocks[i]`` to ``slots[i]``, or back.  Told to ``HostTier.end`` once nothing of it is read or written any more."""

    id: int
    direction: Direction
    blocks: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HostCounts:
    total: int
    free: int
    filling: int
    held: int


@dataclass(slots=True)
class HostTotals:
    """Since start.  Blocks: that were copied down and kept, that came back, and that the pool evicted while no copy was
    held.  ``failed_copies`` counts copies."""

    saved: int = 0
    loaded: int = 0
    lost: int = 0
    failed_copies: int = 0


class HostTier:
    """Of ``pool``, with which it is called from one place at a time.  With no slots it does nothing."""

    def __init__(self, pool: BlockPool, num_slots: int) -> None:
        self.num_slots = num_slots
        self.totals = HostTotals()
        self._pool = pool
        # So many of the blocks that the pool would hand out next are free or copied; others are copied only while fewer
        # than so many lie in both places: a small host is to hold what the pool has evicted, not what it has.
        self._num_ahead = min(pool.num_blocks, -(-num_slots // 2))
        self._free = deque(range(num_slots))
        self._hash: list[bytes | None] = [None] * num_slots
        self._by_hash: dict[bytes, int] = {}
        self._unread: OrderedDict[int, None] = OrderedDict()  # HELD ones that no copy reads, least recently used first
        self._num_readers = [0] * num_slots
        self._both: set[bytes] = set()  # HELD, and in the pool
        self._unsaved: OrderedDict[bytes, None] = (
            OrderedDict()
        )  # entered the pool, in that order, and never looked at here
        self._saving: tuple[Copy, tuple[Content, ...]] | None = None
        self._loading: dict[int, Copy] = {}
        self._to_begin: deque[Copy] = deque()
        self._num_copies = 0
        self._changes: list[CacheChange] = []

    def counts(self) -> HostCounts:
        filling = len(self._saving[0].slots) if self._saving else 0
        return HostCounts(self.num_slots, len(self._free), filling, len(self._by_hash))

    def holds(self, hash_: bytes) -> bool:
        return hash_ in self._by_hash

    def is_loading(self, hash_: bytes) -> bool:
        """Whether what is held under this hash is being copied up."""
        slot = self._by_hash.get(hash_)
        return slot is not None and self._num_readers[slot] > 0

    def hashes(self) -> list[bytes]:
        """Every hash held, for a snapshot."""
        return list(self._by_hash)

    def load(self, hashes: Sequence[bytes], blocks: Sequence[int]) -> Copy:
        """Copies what is held under ``hashes``, which must be, into ``blocks``, which are the caller's until the copy has
        ended.  The slots stay as they are for so long."""
        slots = tuple(self._by_hash[h] for h in hashes)
        for slot in slots:
            self._num_readers[slot] += 1
            self._unread.pop(slot, None)
        copy = self._copy(Direction.UP, tuple(blocks), slots)
        self._loading[copy.id] = copy
        return copy

    def take_copies(self) -> list[Copy]:
        """What is to be copied from now on, in any order.  To be asked whenever the pool or this has changed."""
        if self._saving is None and self.num_slots:
            self._save()
        copies = list(self._to_begin)
        self._to_begin.clear()
        return copies

    def end(self, copy: Copy, *, ok: bool) -> None:
        """The copy was made, or failed somewhere."""
        self.totals.failed_copies += not ok
        if copy.direction is Direction.UP:
            self._end_load(copy, ok=ok)
        else:
            self._end_save(copy, ok=ok)

    def note(self, changes: Sequence[CacheChange]) -> None:
        """What entered and left the pool's cache; to be told before copies are taken."""
        if not self.num_slots:
            return
        for change in changes:
            if not change.stored:
                self._unsaved.pop(change.hash, None)
                self._both.discard(change.hash)
                self.totals.lost += not self.holds(change.hash)
            elif self.holds(change.hash):
                self._both.add(change.hash)
            else:
                self._unsaved[change.hash] = None

    def take_changes(self) -> list[CacheChange]:
        """What entered and left the host since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def check_integrity(self) -> None:
        """Raises AssertionError naming the first account that does not add up, once the pool's changes were noted."""
        filling = self._saving[0].slots if self._saving else ()
        held = sorted(self._by_hash.values())
        assert sorted([*self._free, *filling, *held]) == list(range(self.num_slots)), "a slot has not exactly one state"
        assert {h: s for s, h in enumerate(self._hash) if h is not None} == self._by_hash, "the host's index differs"
        readers = [0] * self.num_slots
        for copy in self._loading.values():
            for slot in copy.slots:
                readers[slot] += 1
        assert readers == self._num_readers, "the readers counted are not those of the copies up"
        assert sorted(self._unread) == [s for s in held if not readers[s]], "the host's LRU list differs"
        assert all(self._hash[s] is not None for s, n in enumerate(readers) if n), "a slot that is read holds nothing"
        in_pool = set(self._pool.hashes()) if self.num_slots else set()
        assert self._both == in_pool & self._by_hash.keys(), "what is in both places differs"
        assert self._unsaved.keys() <= in_pool - self._by_hash.keys(), "what is unsaved differs"

    def loads(self) -> dict[int, Copy]:
        """The copies up that have not ended."""
        return dict(self._loading)

    def _save(self) -> None:
        """Copies down what is next and not here yet."""
        blocks: dict[int, Content] = {}
        slots: list[int] = []
        while len(blocks) < MAX_SAVED_AT_ONCE and (block := self._next(len(blocks))) is not None:
            content = self._pool.content(block)
            assert content is not None
            self._unsaved.pop(content.hash, None)
            if self.holds(content.hash):
                continue
            slot = self._free.popleft() if self._free else self._evict()
            if slot is None:
                break
            blocks[block] = content
            slots.append(slot)
        if blocks:
            self._saving = (self._copy(Direction.DOWN, tuple(blocks), tuple(slots)), tuple(blocks.values()))

    def _next(self, num_chosen: int) -> int | None:
        """A block of the pool to be saved after ``num_chosen`` others, unless it is here."""
        if self._pool.num_foreseen < self._num_ahead and (block := self._pool.foresee()) is not None:
            return block
        while self._unsaved and len(self._both) + num_chosen < self._num_ahead:
            hash_, _ = self._unsaved.popitem(last=False)
            if (block := self._pool.find(hash_)) is not None:
                return block
        return None

    def _end_save(self, copy: Copy, *, ok: bool) -> None:
        assert self._saving is not None
        saving, contents = self._saving
        assert saving is copy, "the copy was not under way"
        self._saving = None
        for block, slot, content in zip(copy.blocks, copy.slots, contents, strict=True):
            if not ok or self._pool.content(block) != content:
                self._free.append(slot)
                continue
            self._hash[slot] = content.hash
            self._by_hash[content.hash] = slot
            self._unread[slot] = None
            self._both.add(content.hash)
            self._changes.append(CacheChange(content.hash, stored=True, tier=Tier.HOST))
            self.totals.saved += 1

    def _end_load(self, copy: Copy, *, ok: bool) -> None:
        del self._loading[copy.id]
        for slot in reversed(copy.slots):  # the end of a prefix is evicted before its beginning
            self._num_readers[slot] -= 1
            if not self._num_readers[slot]:
                self._unread[slot] = None
        self.totals.loaded += ok * len(copy.slots)

    def _evict(self) -> int | None:
        if not self._unread:
            return None
        slot, _ = self._unread.popitem(last=False)
        hash_ = self._hash[slot]
        assert hash_ is not None
        self._hash[slot] = None
        del self._by_hash[hash_]
        self._both.discard(hash_)
        self._changes.append(CacheChange(hash_, stored=False, tier=Tier.HOST))
        return slot

    def _copy(self, direction: Direction, blocks: tuple[int, ...], slots: tuple[int, ...]) -> Copy:
        self._num_copies += 1
        copy = Copy(self._num_copies, direction, blocks, slots)
        self._to_begin.append(copy)
        return copy
