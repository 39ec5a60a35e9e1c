"""Who holds which blocks."""

from __future__ import annotations

import ctypes
import secrets
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from services.directory.library import NUM_WORKERS, load
from services.runtime.tier import Tier

HASH_NBYTES = 16
DEFAULT_MAX_ENTRIES = 20_000_000
# Of one call into the compiled index, which keeps the GIL: about a millisecond.
_MAX_HASHES = 4096
_ALL = (1 << NUM_WORKERS) - 1


def num_hashes(data: bytes) -> int:
    """How many hashes ``data`` holds back to back.  Raises ValueError when its length is no multiple of 16."""
    if len(data) % HASH_NBYTES:
        raise ValueError(f"hashes are {HASH_NBYTES} bytes each, but {len(data)} bytes were sent")
    return len(data) // HASH_NBYTES


class Prefix(NamedTuple):
    """What a worker holds of a chain."""

    num_blocks: int
    """Leading ones without a gap, in any tier."""
    num_device_blocks: int
    """Those of them that are in its device's memory."""


class BlockIndex:
    """Chain hash (16 bytes) -> the workers whose prefix cache holds that block, and in which tiers.

    A chain hash stands for its block and all before it, but a worker may have evicted earlier blocks of a chain.  Hashes
    come and go as bytes, 16 each, back to back.  Raises IndexUnavailable where the compiled core cannot be had.

    At most ``max_entries`` pairs of block and worker are held, at about 60 bytes each (ADR 11); what comes beyond them is
    left out and counted, so that lookups then find less than there is.  Not thread-safe, but the counts may be read from
    any thread.  ``table_bits`` is for tests: 2 ** table_bits tables grow one by one.
    """

    def __init__(self, *, max_entries: int = DEFAULT_MAX_ENTRIES, table_bits: int = 10) -> None:
        self._max_entries = max_entries
        self._table_bits = table_bits
        self._groups = [_Group(table_bits)]
        self._members: dict[str, _Member] = {}
        # Cleared, with blocks that have yet to be dropped.
        self._leaving: deque[_Member] = deque()
        self._num_entries = 0
        self._num_left_out = 0

    def stored(self, worker_id: str, hashes: bytes, tier: Tier = Tier.DEVICE) -> None:
        """Idempotent.  Raises ValueError for what are no hashes."""
        count = num_hashes(hashes)
        self._sweep(2 * count)
        if not count:
            return
        member = self._members.get(worker_id) or self._join(worker_id)
        held_before = member.num_held
        for part in _parts(hashes):
            room = max(0, self._max_entries - self._num_entries)
            before = member.num_held
            self._num_left_out += member.group.store(member.number, tier, part, room)
            self._num_entries += member.num_held - before
        if not held_before and not member.num_held:
            self._let_go(worker_id)

    def removed(self, worker_id: str, hashes: bytes, tier: Tier = Tier.DEVICE) -> None:
        """Idempotent; what the worker does not hold in ``tier`` is ignored.  Raises ValueError for what are no hashes."""
        self._sweep(2 * num_hashes(hashes))
        member = self._members.get(worker_id)
        if member is None:
            return
        before = member.num_held
        for part in _parts(hashes):
            member.group.remove(member.number, tier, part)
        self._num_entries -= before - member.num_held
        if not member.num_held:
            self._let_go(worker_id)

    def cleared(self, worker_id: str) -> None:
        """The worker holds nothing (any more), or is gone.  At once for every lookup; the memory of a large cache comes
        back by and by, two blocks for each that is stored or removed."""
        member = self._members.get(worker_id)
        if member is None:
            return
        del self._members[worker_id]
        member.group.hide(member.number)
        self._leaving.append(member)
        self._sweep(_MAX_HASHES)

    def longest_prefix(self, hashes: bytes) -> dict[str, Prefix]:
        """For each worker that holds the chain's first block, how many leading ones.  Raises ValueError for what are no
        hashes."""
        count = num_hashes(hashes)
        found: dict[str, Prefix] = {}
        for group in self._groups:
            group.match(hashes, count, found)
        return found

    def held_by(self, worker_id: str, tier: Tier, max_hashes: int) -> Iterator[bytes]:
        """The hashes of what the worker holds in ``tier``, at most ``max_hashes`` at a time.  What changes between two
        parts may be in them or not."""
        member = self._members.get(worker_id)
        return member.group.list(member.number, tier, max_hashes) if member else iter(())

    def num_blocks(self, worker_id: str) -> int:
        member = self._members.get(worker_id)
        return member.num_held if member else 0

    def num_blocks_by_worker(self) -> Mapping[str, int]:
        """Workers that hold nothing are left out."""
        return {worker_id: member.num_held for worker_id, member in self._members.items()}

    @property
    def num_entries(self) -> int:
        """Pairs of block and worker, with those of cleared workers that have yet to be dropped."""
        return self._num_entries

    @property
    def num_left_out(self) -> int:
        """Blocks that were not taken in since the index was full."""
        return self._num_left_out

    @property
    def nbytes(self) -> int:
        """Memory set aside."""
        return sum(group.nbytes for group in self._groups)

    def check_integrity(self) -> None:
        """Raises AssertionError when something does not add up."""
        numbers = [(id(m.group), m.number) for m in (*self._members.values(), *self._leaving)]
        assert len(set(numbers)) == len(numbers), "two workers have one number"
        assert all(member.num_held for member in self._members.values()), "a worker without blocks was kept"
        assert {(id(m.group), m.number): name for name, m in self._members.items()} == {
            (id(group), number): name for group in self._groups for number, name in group.names.items()
        }, "names and numbers differ"
        held = sum(group.num_held(number) for group in self._groups for number in range(NUM_WORKERS))
        assert held == self._num_entries, f"{self._num_entries} entries are counted and {held} held"
        for group in self._groups:
            group.check_integrity()

    def _join(self, worker_id: str) -> _Member:
        group = next((group for group in self._groups if group.has_room), None)
        if group is None:
            group = _Group(self._table_bits)
            self._groups.append(group)
        member = self._members[worker_id] = _Member(group, group.take(worker_id))
        return member

    def _let_go(self, worker_id: str) -> None:
        member = self._members.pop(worker_id)
        member.group.hide(member.number)
        member.group.give(member.number)

    def _sweep(self, max_blocks: int) -> None:
        while self._leaving and max_blocks > 0:
            member = self._leaving[0]
            num_dropped = member.group.drop(member.number, min(max_blocks, _MAX_HASHES))
            max_blocks -= num_dropped
            self._num_entries -= num_dropped
            if not member.num_held:
                member.group.give(member.number)
                self._leaving.popleft()


class _Group:
    """Up to 64 workers, by number, in one compiled index."""

    def __init__(self, table_bits: int) -> None:
        self._library = load()
        self._handle = self._library.kvd_open(secrets.randbits(64), table_bits)
        if not self._handle:
            raise MemoryError("no memory for a block index")
        weakref.finalize(self, self._library.kvd_close, self._handle)
        self.names: dict[int, str] = {}
        self._free = list(reversed(range(NUM_WORKERS)))
        self._shown = 0
        self._prefixes = (ctypes.c_uint32 * (3 * NUM_WORKERS))()

    @property
    def has_room(self) -> bool:
        return bool(self._free)

    def take(self, worker_id: str) -> int:
        """A number for this worker, which lookups name from now on."""
        number = self._free.pop()
        self.names[number] = worker_id
        self._shown |= 1 << number
        return number

    def hide(self, number: int) -> None:
        """Lookups do not name it any more."""
        del self.names[number]
        self._shown &= ~(1 << number)

    def give(self, number: int) -> None:
        """To be taken again; it is hidden and holds nothing."""
        self._free.append(number)

    def store(self, number: int, tier: Tier, hashes: bytes, room: int) -> int:
        count = len(hashes) // HASH_NBYTES
        left_out: int = self._library.kvd_store(self._handle, number, _tier(tier), hashes, count, room)
        return left_out

    def remove(self, number: int, tier: Tier, hashes: bytes) -> None:
        self._library.kvd_remove(self._handle, number, _tier(tier), hashes, len(hashes) // HASH_NBYTES)

    def drop(self, number: int, max_blocks: int) -> int:
        dropped: int = self._library.kvd_drop(self._handle, number, max_blocks)
        return dropped

    def list(self, number: int, tier: Tier, max_hashes: int) -> Iterator[bytes]:
        cursor, hashes = ctypes.c_uint32(0), ctypes.create_string_buffer(max_hashes * HASH_NBYTES)
        while True:
            count = self._library.kvd_list(self._handle, number, _tier(tier), ctypes.byref(cursor), hashes, max_hashes)
            if count:
                yield hashes.raw[: count * HASH_NBYTES]
            if count < max_hashes:
                return

    def match(self, hashes: bytes, count: int, into: dict[str, Prefix]) -> None:
        found = self._library.kvd_match(self._handle, self._shown, hashes, count, self._prefixes)
        numbers = self._prefixes[: 3 * found]
        names = self.names
        for number, num_blocks, num_on_device in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
            into[names[number]] = Prefix(num_blocks, num_on_device)

    def num_held(self, number: int) -> int:
        held: int = self._library.kvd_num_held(self._handle, number)
        return held

    @property
    def nbytes(self) -> int:
        nbytes: int = self._library.kvd_nbytes(self._handle)
        return nbytes

    def check_integrity(self) -> None:
        fault = self._library.kvd_fault(self._handle)
        assert fault is None, fault.decode()


@dataclass(frozen=True, slots=True)
class _Member:
    group: _Group
    number: int

    @property
    def num_held(self) -> int:
        return self.group.num_held(self.number)


def _tier(tier: Tier) -> int:
    return tier.value - 1


def _parts(hashes: bytes) -> Iterator[bytes]:
    step = _MAX_HASHES * HASH_NBYTES
    return (hashes[start : start + step] for start in range(0, len(hashes), step))
