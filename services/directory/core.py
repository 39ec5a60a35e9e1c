"""The directory's state and its rules: leases, membership, block events, history.

No clock and no socket: time comes in as ``now_s``, seconds of any monotonic clock.  What happened goes out as events,
each with the revision that it led to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import islice

from services.directory.index import DEFAULT_MAX_ENTRIES, BlockIndex, Prefix, num_hashes
from services.runtime.tier import Tier

# So many hashes are in one event of a snapshot at most (512 KiB).
_SNAPSHOT_HASHES = 1 << 15
# What an event without payload is taken to need in the history.
_EVENT_NBYTES = 256
# How many predecessors under its worker_id a worker's entry remembers.
_MAX_REPLACED = 16


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class LeaveReason(Enum):
    DEREGISTERED = "deregistered"
    EXPIRED = "expired"
    REPLACED = "replaced"


@dataclass(frozen=True, slots=True)
class Worker:
    """``info`` and ``load`` are opaque here: the encoded descriptions that watchers get."""

    worker_id: str
    incarnation: int
    role: Role
    info: bytes
    load: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    hashes: bytes
    """16 bytes each, back to back."""
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class Removed:
    hashes: bytes
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class Cleared:
    """In all tiers."""


BlockChange = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class Joined:
    worker: Worker


@dataclass(frozen=True, slots=True)
class Left:
    worker_id: str
    incarnation: int
    reason: LeaveReason


@dataclass(frozen=True, slots=True)
class LoadChanged:
    worker_id: str
    incarnation: int
    load: bytes


@dataclass(frozen=True, slots=True)
class BlocksChanged:
    worker_id: str
    incarnation: int
    changes: tuple[BlockChange, ...]


Event = Joined | Left | LoadChanged | BlocksChanged


class UnknownLeaseError(Exception):
    """The lease has ended, or was never given by this directory."""


class ReplacedError(Exception):
    """Another incarnation has taken this one's place and is alive."""


class IncarnationReusedError(Exception):
    """Two different workers say that they are the same incarnation."""


class SequenceGapError(Exception):
    """Block events are missing before these."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"expected block event {expected}, got {got}")
        self.expected = expected
        self.got = got


@dataclass(slots=True)
class _Member:
    worker: Worker
    lease_id: int
    ttl_s: float
    expires_s: float
    next_sequence: int = 1
    # Incarnations that must not come back: a process that was replaced may still run and try to.
    replaced: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_REPLACED))


class Directory:
    """Not thread-safe.

    ``first_revision`` must be beyond every revision of an earlier life, so that a watcher of that life is recognised;
    ``lease_ids`` yields ids that no earlier life has given.  The history keeps the latest events, at most ``max_events``
    and about ``max_history_nbytes``; the index holds at most ``max_index_entries`` pairs of block and worker.
    """

    def __init__(
        self,
        *,
        first_revision: int,
        lease_ids: Iterator[int],
        max_events: int = 100_000,
        max_history_nbytes: int = 64 << 20,
        max_index_entries: int = DEFAULT_MAX_ENTRIES,
    ) -> None:
        assert first_revision > 0, "0 asks for a snapshot"
        self._revision = first_revision
        self._lease_ids = lease_ids
        self._max_events = max_events
        self._max_history_nbytes = max_history_nbytes
        # Oldest first; the last one led to the present revision.
        self._history: deque[Event] = deque()
        self._history_nbytes = 0
        self._members: dict[str, _Member] = {}
        self._by_lease: dict[int, _Member] = {}
        self._index = BlockIndex(max_entries=max_index_entries)

    @property
    def revision(self) -> int:
        """Grows by one with each event."""
        return self._revision

    def workers(self) -> list[Worker]:
        # Copied in one step, since metrics are read from another thread.
        return [member.worker for member in list(self._members.values())]

    @property
    def index(self) -> BlockIndex:
        """To be read, not changed."""
        return self._index

    def register(self, worker: Worker, ttl_s: float, now_s: float) -> int:
        """Returns the lease.  The same incarnation again keeps its lease and its blocks, and numbers its block events
        from 1 again; another incarnation replaces the one before.  Raises ReplacedError for an incarnation that was
        replaced by the present one, IncarnationReusedError when the same incarnation describes itself differently."""
        self.expire(now_s)
        present = self._members.get(worker.worker_id)
        if present is not None and present.worker.incarnation == worker.incarnation:
            if present.worker.info != worker.info:
                raise IncarnationReusedError(
                    f"worker {worker.worker_id} incarnation {worker.incarnation} is registered with another description"
                )
            present.ttl_s, present.expires_s, present.next_sequence = ttl_s, now_s + ttl_s, 1
            self._set_load(present, worker.load)
            return present.lease_id
        member = _Member(worker, next(self._lease_ids), ttl_s, now_s + ttl_s)
        if present is not None:
            if worker.incarnation in present.replaced:
                raise ReplacedError(
                    f"worker {worker.worker_id} was replaced by incarnation {present.worker.incarnation}; "
                    "give one of them another worker id, or stop it"
                )
            member.replaced.extend(present.replaced)
            member.replaced.append(present.worker.incarnation)
            self._remove(present, LeaveReason.REPLACED)
        self._members[worker.worker_id] = member
        self._by_lease[member.lease_id] = member
        self._append(Joined(worker))
        return member.lease_id

    def keep_alive(self, lease_id: int, load: bytes, now_s: float) -> float:
        """Renews the lease and returns its time to live in seconds.  Raises UnknownLeaseError."""
        member = self._member(lease_id, now_s)
        member.expires_s = now_s + member.ttl_s
        self._set_load(member, load)
        return member.ttl_s

    def deregister(self, lease_id: int) -> None:
        """Idempotent."""
        member = self._by_lease.get(lease_id)
        if member is not None:
            self._remove(member, LeaveReason.DEREGISTERED)

    def expire(self, now_s: float) -> int:
        """Removes whoever's lease has ended; returns how many."""
        ended = [member for member in self._members.values() if member.expires_s <= now_s]
        for member in ended:
            self._remove(member, LeaveReason.EXPIRED)
        return len(ended)

    def next_expiry_s(self) -> float | None:
        """When the first lease ends if nobody renews; None without leases."""
        return min((member.expires_s for member in self._members.values()), default=None)

    def publish_blocks(self, lease_id: int, first_sequence: int, changes: Sequence[BlockChange], now_s: float) -> int:
        """Applies ``changes``, numbered from ``first_sequence``, and returns the number expected next.  Changes applied
        before are skipped, so sending again is harmless.  Raises UnknownLeaseError; SequenceGapError when changes before
        these are missing, unless these begin with Cleared, which makes the missing ones immaterial; ValueError, with
        nothing applied, when hashes are not 16 bytes each."""
        member = self._member(lease_id, now_s)
        for change in changes:
            if not isinstance(change, Cleared):
                num_hashes(change.hashes)
        if first_sequence > member.next_sequence:
            if not changes or not isinstance(changes[0], Cleared):
                raise SequenceGapError(member.next_sequence, first_sequence)
            member.next_sequence = first_sequence
        fresh = tuple(changes[member.next_sequence - first_sequence :])
        if fresh:
            member.next_sequence += len(fresh)
            worker_id = member.worker.worker_id
            for change in fresh:
                apply_change(self._index, worker_id, change)
            self._append(BlocksChanged(worker_id, member.worker.incarnation, fresh))
        return member.next_sequence

    def longest_prefix(self, hashes: bytes) -> list[tuple[Worker, Prefix]]:
        """How much of the chain each worker holds that holds any of it.  Raises ValueError when ``hashes`` are not 16
        bytes each."""
        return [
            (self._members[worker_id].worker, prefix)
            for worker_id, prefix in self._index.longest_prefix(hashes).items()
        ]

    def snapshot(self) -> list[Event]:
        """What a watcher that knows nothing needs in order to know everything; all Joined come first."""
        events: list[Event] = [Joined(member.worker) for member in self._members.values()]
        for worker_id, member in self._members.items():
            for tier in Tier:
                for hashes in self._index.held_by(worker_id, tier, _SNAPSHOT_HASHES):
                    change = Stored(hashes, tier)
                    events.append(BlocksChanged(worker_id, member.worker.incarnation, (change,)))
        return events

    def events_since(self, revision: int) -> list[Event] | None:
        """The events after ``revision``, oldest first; None when the history does not reach back that far, or the
        revision is not one of this directory's life."""
        num_missing = self._revision - revision
        if not 0 <= num_missing <= len(self._history):
            return None
        return list(islice(reversed(self._history), num_missing))[::-1]

    def check_integrity(self) -> None:
        """Raises AssertionError when the accounts do not add up."""
        self._index.check_integrity()
        assert {m.lease_id: m.worker.worker_id for m in self._members.values()} == {
            lease_id: m.worker.worker_id for lease_id, m in self._by_lease.items()
        }, "members and leases differ"
        assert set(self._index.num_blocks_by_worker()) <= set(self._members), "blocks of a worker that is gone"
        assert sum(map(event_nbytes, self._history)) == self._history_nbytes, "the history's size is wrong"

    def _member(self, lease_id: int, now_s: float) -> _Member:
        member = self._by_lease.get(lease_id)
        if member is not None and member.expires_s <= now_s:
            self.expire(now_s)
            member = None
        if member is None:
            raise UnknownLeaseError(f"lease {lease_id} has ended; register again")
        return member

    def _set_load(self, member: _Member, load: bytes) -> None:
        worker = member.worker
        if worker.load != load:
            member.worker = replace(worker, load=load)
            self._append(LoadChanged(worker.worker_id, worker.incarnation, load))

    def _remove(self, member: _Member, reason: LeaveReason) -> None:
        worker = member.worker
        del self._members[worker.worker_id]
        del self._by_lease[member.lease_id]
        self._index.cleared(worker.worker_id)
        self._append(Left(worker.worker_id, worker.incarnation, reason))

    def _append(self, event: Event) -> None:
        self._revision += 1
        self._history.append(event)
        self._history_nbytes += event_nbytes(event)
        while len(self._history) > self._max_events or self._history_nbytes > self._max_history_nbytes:
            self._history_nbytes -= event_nbytes(self._history.popleft())


def apply_change(index: BlockIndex, worker_id: str, change: BlockChange) -> None:
    match change:
        case Stored(hashes, tier):
            index.stored(worker_id, hashes, tier)
        case Removed(hashes, tier):
            index.removed(worker_id, hashes, tier)
        case Cleared():
            index.cleared(worker_id)


def event_nbytes(event: Event) -> int:
    """About what the event needs in memory and on the wire."""
    match event:
        case Joined(worker):
            return _EVENT_NBYTES + len(worker.info) + len(worker.load)
        case LoadChanged():
            return _EVENT_NBYTES + len(event.load)
        case BlocksChanged():
            payload = sum(len(c.hashes) for c in event.changes if not isinstance(c, Cleared))
            return _EVENT_NBYTES * len(event.changes) + payload
        case Left():
            return _EVENT_NBYTES
