"""Who owns each KV block of one pool.  Pure accounting: no memory, clock or lock in here.

Every block is in exactly one state, and free + active + cached + lent + quarantined = total at every instant:

    FREE         nobody's
    ACTIVE       held by one or more sequences or pins (a reference each)
    CACHED       held by none; its content is known by a hash and may be acquired again, or evicted
    LENT         promised to a remote writer, which may be writing now
    QUARANTINED  taken back from a writer that has not yet been proven to have stopped

LENT and QUARANTINED blocks are never handed out: the only way back is ``settle`` (the writer committed) or ``restore``
(proof that the writer has stopped).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from services.runtime.tier import Tier


class BlockState(Enum):
    FREE = auto()
    ACTIVE = auto()
    CACHED = auto()
    LENT = auto()
    QUARANTINED = auto()


class OutOfBlocksError(Exception):
    """The pool has fewer free and evictable blocks than were asked for; nothing was taken."""


@dataclass(frozen=True, slots=True)
class Counts:
    total: int
    free: int
    active: int
    cached: int
    lent: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class CacheChange:
    """A hash that entered (``stored``) or left one tier of the prefix cache."""

    hash: bytes
    stored: bool
    tier: Tier = Tier.DEVICE


class Content(NamedTuple):
    """What a block holds.  Equal as long as the block has kept it: ``num_evictions`` tells apart two times that it held the
    same."""

    hash: bytes
    num_evictions: int


class BlockPool:
    """Not thread-safe; one owner calls it."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._state = [BlockState.FREE] * num_blocks
        self._references = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free = deque(range(num_blocks))
        # CACHED blocks, least recently used first: all that are foreseen before all that are not.
        self._foreseen: OrderedDict[int, None] = OrderedDict()
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_evictions = [0] * num_blocks
        self._num = dict.fromkeys(BlockState, 0) | {BlockState.FREE: num_blocks}
        self._changes: list[CacheChange] = []

    @property
    def num_available(self) -> int:
        """Blocks that ``allocate`` or ``lend`` could hand out now."""
        return self.num_foreseen + len(self._cached)

    @property
    def num_foreseen(self) -> int:
        """Of these, those that ``allocate`` and ``lend`` hand out before they evict one that was not foreseen."""
        return len(self._free) + len(self._foreseen)

    def counts(self) -> Counts:
        return Counts(self.num_blocks, *(self._num[state] for state in BlockState))

    def allocate(self, count: int) -> list[int]:
        """ACTIVE blocks with one reference each, evicting the least recently used cached ones where needed."""
        return self._take(count, BlockState.ACTIVE)

    def lend(self, count: int) -> list[int]:
        """LENT blocks for one remote writer."""
        return self._take(count, BlockState.LENT)

    def settle(self, blocks: Iterable[int]) -> None:
        """LENT to ACTIVE with one reference: their writer has committed."""
        for block in blocks:
            self._move(block, BlockState.LENT, BlockState.ACTIVE)
            self._references[block] = 1

    def quarantine(self, blocks: Iterable[int]) -> None:
        """LENT to QUARANTINED: given up, but the writer may still be writing."""
        for block in blocks:
            self._move(block, BlockState.LENT, BlockState.QUARANTINED)

    def restore(self, blocks: Iterable[int]) -> None:
        """QUARANTINED to FREE.  The caller holds proof that the writer has stopped."""
        for block in blocks:
            self._move(block, BlockState.QUARANTINED, BlockState.FREE)
            self._free.append(block)

    def foresee(self) -> int | None:
        """The CACHED block that is evicted next after those foreseen before, unless it is acquired first; None when there
        is no other."""
        if not self._cached:
            return None
        block, _ = self._cached.popitem(last=False)
        self._foreseen[block] = None
        return block

    def content(self, block: int) -> Content | None:
        """None where it has no hash."""
        hash_ = self._hash[block]
        return None if hash_ is None else Content(hash_, self._num_evictions[block])

    def find(self, hash_: bytes) -> int | None:
        """The block of that content.  It stays evictable until acquired."""
        return self._by_hash.get(hash_)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest prefix of the chain held here.  They stay evictable until acquired."""
        blocks = []
        for h in hashes:
            block = self._by_hash.get(h)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference on each of ``blocks``, which must be ACTIVE or CACHED."""
        for block in blocks:
            if self._state[block] is BlockState.CACHED:
                del (self._foreseen if block in self._foreseen else self._cached)[block]
                self._move(block, BlockState.CACHED, BlockState.ACTIVE)
            assert self._state[block] is BlockState.ACTIVE, f"block {block} is {self._state[block].name}"
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less on each.  Blocks without references become CACHED when hashed, otherwise FREE.  Given in the
        order of the sequence, the end of a prefix is evicted before its beginning."""
        for block in reversed(blocks):
            assert self._state[block] is BlockState.ACTIVE, f"block {block} is {self._state[block].name}"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._hash[block] is not None:
                self._move(block, BlockState.ACTIVE, BlockState.CACHED)
                self._cached[block] = None
            else:
                self._move(block, BlockState.ACTIVE, BlockState.FREE)
                self._free.append(block)

    def remember(self, block: int, hash_: bytes) -> None:
        """Names the content of an ACTIVE, full block.  Where another block bears the hash already, that one keeps it."""
        assert self._state[block] is BlockState.ACTIVE, f"block {block} is {self._state[block].name}"
        if self._hash[block] is not None or hash_ in self._by_hash:
            return
        self._hash[block] = hash_
        self._by_hash[hash_] = block
        self._changes.append(CacheChange(hash_, stored=True))

    def hashes(self) -> list[bytes]:
        """Every hash held, for a snapshot."""
        return list(self._by_hash)

    def references(self) -> dict[int, int]:
        """How many references each ACTIVE block has."""
        return {block: n for block, n in enumerate(self._references) if n}

    def lent_blocks(self) -> list[int]:
        return [b for b, s in enumerate(self._state) if s is BlockState.LENT]

    def quarantined_blocks(self) -> list[int]:
        return [b for b, s in enumerate(self._state) if s is BlockState.QUARANTINED]

    def take_changes(self) -> list[CacheChange]:
        """What entered and left the cache since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def check_integrity(self) -> None:
        """Raises AssertionError naming the first account that does not add up."""
        for state in BlockState:
            held = sum(s is state for s in self._state)
            assert held == self._num[state], f"{state.name}: {held} blocks, {self._num[state]} counted"
        assert sorted(self._free) == [b for b, s in enumerate(self._state) if s is BlockState.FREE], (
            "the free list differs"
        )
        cached = sorted(b for b, s in enumerate(self._state) if s is BlockState.CACHED)
        assert sorted([*self._foreseen, *self._cached]) == cached, "the LRU lists differ"
        for block, state in enumerate(self._state):
            assert (self._references[block] > 0) == (state is BlockState.ACTIVE), (
                f"block {block}: references in {state.name}"
            )
            if state in (BlockState.FREE, BlockState.LENT, BlockState.QUARANTINED):
                assert self._hash[block] is None, f"block {block} is {state.name} and hashed"
        assert {h: b for b, h in enumerate(self._hash) if h is not None} == self._by_hash, "the hash index differs"

    def _take(self, count: int, state: BlockState) -> list[int]:
        if count > self.num_available:
            raise OutOfBlocksError(f"{count} blocks asked for, {self.num_available} available of {self.num_blocks}")
        blocks = []
        for _ in range(count):
            block = self._free.popleft() if self._free else self._evict()
            self._move(block, BlockState.FREE, state)
            self._references[block] = int(state is BlockState.ACTIVE)
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block, _ = (self._foreseen or self._cached).popitem(last=False)
        hash_ = self._hash[block]
        assert hash_ is not None
        del self._by_hash[hash_]
        self._hash[block] = None
        self._num_evictions[block] += 1
        self._changes.append(CacheChange(hash_, stored=False))
        self._move(block, BlockState.CACHED, BlockState.FREE)
        return block

    def _move(self, block: int, old: BlockState, new: BlockState) -> None:
        assert self._state[block] is old, f"block {block} is {self._state[block].name}, not {old.name}"
        self._state[block] = new
        self._num[old] -= 1
        self._num[new] += 1
