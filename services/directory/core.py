"""The directory's rules, for the store that keeps them in this process: leases, membership, sequence numbers.

No clock and no socket: time comes in as ``now_s``, seconds of any monotonic clock.  What happened becomes steps of a
ClusterState.  rules.lua says the same for the store in Redis.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from services.directory.events import (
    BlockChange,
    BlocksChanged,
    Cleared,
    Event,
    Joined,
    LeaveReason,
    Left,
    LoadChanged,
    Worker,
)
from services.directory.index import num_hashes
from services.directory.state import ClusterState

# How many predecessors under its worker_id a worker's entry remembers.
MAX_REPLACED = 16


class UnknownLeaseError(Exception):
    """The lease has ended, or was never given by this directory."""

    def __init__(self, lease_id: int) -> None:
        super().__init__(f"lease {lease_id} has ended; register again")


class ReplacedError(Exception):
    """Another incarnation has taken this one's place and is alive."""

    def __init__(self, worker_id: str, present_incarnation: int) -> None:
        super().__init__(
            f"worker {worker_id} was replaced by incarnation {present_incarnation}; "
            "give one of them another worker id, or stop it"
        )


class IncarnationReusedError(Exception):
    """Two different workers say that they are the same incarnation."""

    def __init__(self, worker_id: str, incarnation: int) -> None:
        super().__init__(f"worker {worker_id} incarnation {incarnation} is registered with another description")


class SequenceGapError(Exception):
    """Block events are missing before these."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"expected block event {expected}, got {got}")
        self.expected = expected
        self.got = got


class SnapshotWantedError(Exception):
    """The store wants to begin anew with this worker's blocks, as their account has grown long; nothing is missing."""

    def __init__(self) -> None:
        super().__init__("the account of removed blocks has grown long; send a snapshot")


@dataclass(slots=True)
class _Member:
    worker_id: str
    incarnation: int
    lease_id: int
    ttl_s: float
    expires_s: float
    next_sequence: int = 1
    # Incarnations that must not come back: a process that was replaced may still run and try to.
    replaced: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_REPLACED))


class Directory:
    """Not thread-safe.

    ``state`` begins at a revision beyond every one of an earlier life, so that a watcher of that life is recognised;
    ``lease_ids`` yields ids that no earlier life has given.
    """

    def __init__(self, state: ClusterState, lease_ids: Iterator[int]) -> None:
        self._state = state
        self._lease_ids = lease_ids
        self._members: dict[str, _Member] = {}
        self._by_lease: dict[int, _Member] = {}

    @property
    def state(self) -> ClusterState:
        """To be read, not changed.  Its revision grows by one with each event."""
        return self._state

    def register(self, worker: Worker, ttl_s: float, now_s: float) -> int:
        """Returns the lease, a new one each time.  The same incarnation again keeps its blocks, and numbers its block
        events from 1 again; another incarnation replaces the one before.  Raises ReplacedError for an incarnation that was
        replaced by the present one, IncarnationReusedError when the same incarnation describes itself differently."""
        self.expire(now_s)
        present = self._members.get(worker.worker_id)
        if present is not None and present.incarnation == worker.incarnation:
            if self._state.workers[worker.worker_id].info != worker.info:
                raise IncarnationReusedError(worker.worker_id, worker.incarnation)
            del self._by_lease[present.lease_id]
            present.lease_id = next(self._lease_ids)
            self._by_lease[present.lease_id] = present
            present.ttl_s, present.expires_s, present.next_sequence = ttl_s, now_s + ttl_s, 1
            self._set_load(present, worker.load)
            return present.lease_id
        member = _Member(worker.worker_id, worker.incarnation, next(self._lease_ids), ttl_s, now_s + ttl_s)
        if present is not None:
            if worker.incarnation in present.replaced:
                raise ReplacedError(worker.worker_id, present.incarnation)
            member.replaced.extend(present.replaced)
            member.replaced.append(present.incarnation)
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

    def renew_all(self, now_s: float) -> None:
        """Gives every lease its whole time again, for when nobody could renew."""
        for member in self._members.values():
            member.expires_s = now_s + member.ttl_s

    def next_expiry_s(self) -> float | None:
        """When the first lease ends if nobody renews; None without leases."""
        return min((member.expires_s for member in self._members.values()), default=None)

    def publish_blocks(self, lease_id: int, first_sequence: int, changes: Sequence[BlockChange], now_s: float) -> int:
        """Applies ``changes``, numbered from ``first_sequence``, and returns the number expected next.  Changes applied
        before are skipped, so sending again is harmless.  Raises UnknownLeaseError; SequenceGapError when changes before
        these are missing, unless these begin with Cleared, which makes the missing ones immaterial; ValueError, with
        nothing applied, when hashes are not 16 bytes each."""
        member = self._member(lease_id, now_s)
        check_hashes(changes)
        if first_sequence > member.next_sequence:
            if not changes or not isinstance(changes[0], Cleared):
                raise SequenceGapError(member.next_sequence, first_sequence)
            member.next_sequence = first_sequence
        fresh = tuple(changes[member.next_sequence - first_sequence :])
        if fresh:
            member.next_sequence += len(fresh)
            self._append(BlocksChanged(member.worker_id, member.incarnation, fresh))
        return member.next_sequence

    def check_integrity(self) -> None:
        """Raises AssertionError when the accounts do not add up."""
        self._state.check_integrity()
        assert {m.lease_id: m.worker_id for m in self._members.values()} == {
            lease_id: m.worker_id for lease_id, m in self._by_lease.items()
        }, "members and leases differ"
        assert {m.worker_id: m.incarnation for m in self._members.values()} == {
            worker.worker_id: worker.incarnation for worker in self._state.workers.values()
        }, "members and the state's workers differ"

    def _member(self, lease_id: int, now_s: float) -> _Member:
        member = self._by_lease.get(lease_id)
        if member is not None and member.expires_s <= now_s:
            self.expire(now_s)
            member = None
        if member is None:
            raise UnknownLeaseError(lease_id)
        return member

    def _set_load(self, member: _Member, load: bytes) -> None:
        if self._state.workers[member.worker_id].load != load:
            self._append(LoadChanged(member.worker_id, member.incarnation, load))

    def _remove(self, member: _Member, reason: LeaveReason) -> None:
        del self._members[member.worker_id]
        del self._by_lease[member.lease_id]
        self._append(Left(member.worker_id, member.incarnation, reason))

    def _append(self, event: Event) -> None:
        self._state.apply(self._state.revision + 1, (event,))


def check_hashes(changes: Sequence[BlockChange]) -> None:
    """Raises ValueError when hashes are not 16 bytes each."""
    for change in changes:
        if not isinstance(change, Cleared):
            num_hashes(change.hashes)
