from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.directory.core import (
    Directory,
    IncarnationReusedError,
    ReplacedError,
    SequenceGapError,
    UnknownLeaseError,
)
from services.directory.events import (
    BlocksChanged,
    Cleared,
    Event,
    Joined,
    LeaveReason,
    Left,
    LoadChanged,
    Removed,
    Role,
    Stored,
    Worker,
    event_nbytes,
)
from services.directory.index import Prefix
from services.directory.state import ClusterState
from services.runtime.tier import Tier

START = 1_000


def block(n: int) -> bytes:
    return n.to_bytes(16, "big")


def blocks(*numbers: int) -> bytes:
    return b"".join(map(block, numbers))


def worker(worker_id: str = "w", incarnation: int = 1, load: bytes = b"load") -> Worker:
    return Worker(worker_id, incarnation, Role.DECODE, f"{worker_id}/{incarnation}".encode(), load)


def make(**limits: int) -> Directory:
    return Directory(ClusterState(START, **limits), itertools.count(7))


def test_a_lease_ends_exactly_when_it_says() -> None:
    directory = make()
    lease = directory.register(worker(), ttl_s=5, now_s=10)
    assert directory.next_expiry_s() == 15
    assert directory.expire(14.5) == 0
    assert directory.keep_alive(lease, b"load", 14.5) == 5
    assert directory.next_expiry_s() == 19.5
    assert directory.expire(19.5) == 1
    assert directory.next_expiry_s() is None
    assert directory.state.events_since(START) == [Joined(worker()), Left("w", 1, LeaveReason.EXPIRED)]
    with pytest.raises(UnknownLeaseError):
        directory.keep_alive(lease, b"load", 20)


def test_all_leases_can_be_given_their_whole_time_again() -> None:
    directory = make()
    directory.register(worker("a"), ttl_s=5, now_s=0)
    directory.register(worker("b"), ttl_s=8, now_s=0)
    directory.renew_all(30)
    assert directory.expire(34.9) == 0
    assert directory.expire(35) == 1
    assert directory.next_expiry_s() == 38


def test_a_late_keep_alive_does_not_revive_even_before_the_timer() -> None:
    directory = make()
    lease = directory.register(worker(), ttl_s=5, now_s=0)
    with pytest.raises(UnknownLeaseError):
        directory.keep_alive(lease, b"load", 5)
    with pytest.raises(UnknownLeaseError):
        directory.publish_blocks(lease, 1, [Cleared()], 5)
    assert dict(directory.state.workers) == {}
    directory.check_integrity()


def test_an_expired_incarnation_may_come_back() -> None:
    directory = make()
    first = directory.register(worker(), 5, 0)
    directory.expire(6)
    second = directory.register(worker(), 5, 7)
    assert second != first
    assert [type(e) for e in directory.state.events_since(START) or ()] == [Joined, Left, Joined]


def test_a_new_incarnation_replaces_and_the_old_one_cannot_return() -> None:
    directory = make()
    old = directory.register(worker(incarnation=1), 5, 0)
    directory.publish_blocks(old, 1, [Stored(blocks(1, 2))], 0)
    directory.register(worker(incarnation=2), 5, 1)
    assert directory.state.events_since(START + 2) == [
        Left("w", 1, LeaveReason.REPLACED),
        Joined(worker(incarnation=2)),
    ]
    assert directory.state.longest_prefix(block(1)) == []
    with pytest.raises(UnknownLeaseError):
        directory.keep_alive(old, b"load", 1)
    with pytest.raises(ReplacedError, match="incarnation 2"):
        directory.register(worker(incarnation=1), 5, 1)
    directory.register(worker(incarnation=3), 5, 1)
    for incarnation in (1, 2):
        with pytest.raises(ReplacedError):
            directory.register(worker(incarnation=incarnation), 5, 1)
    directory.check_integrity()


def test_the_same_incarnation_renews() -> None:
    directory = make()
    old = directory.register(worker(), 5, 0)
    directory.publish_blocks(old, 1, [Stored(blocks(1))], 0)
    lease = directory.register(worker(load=b"more"), 8, 4)
    # Whatever was sent under the old one is of before.
    with pytest.raises(UnknownLeaseError):
        directory.publish_blocks(old, 2, [Stored(blocks(3))], 4)
    assert directory.next_expiry_s() == 12
    assert directory.state.events_since(START + 2) == [LoadChanged("w", 1, b"more")]
    # A process that registers again has forgotten its numbers.
    assert directory.publish_blocks(lease, 1, [Cleared(), Stored(blocks(2))], 4) == 3
    assert directory.state.longest_prefix(block(1)) == []
    with pytest.raises(IncarnationReusedError):
        directory.register(replace(worker(), info=b"another host"), 5, 4)


def test_an_unchanged_load_is_no_event() -> None:
    directory = make()
    lease = directory.register(worker(), 5, 0)
    revision = directory.state.revision
    directory.keep_alive(lease, b"load", 1)
    assert directory.state.revision == revision
    directory.keep_alive(lease, b"new", 1)
    assert directory.state.events_since(revision) == [LoadChanged("w", 1, b"new")]


def test_deregister_is_idempotent() -> None:
    directory = make()
    lease = directory.register(worker(), 5, 0)
    directory.deregister(lease)
    directory.deregister(lease)
    assert directory.state.events_since(START + 1) == [Left("w", 1, LeaveReason.DEREGISTERED)]


def test_block_events_are_applied_once_and_gaps_are_noticed() -> None:
    directory = make()
    lease = directory.register(worker(), 5, 0)
    assert directory.publish_blocks(lease, 1, [Stored(blocks(1, 2)), Removed(blocks(2))], 0) == 3
    revision = directory.state.revision
    # The answer was lost; the same again, and again with something new.
    assert directory.publish_blocks(lease, 1, [Stored(blocks(1, 2)), Removed(blocks(2))], 0) == 3
    assert directory.state.revision == revision
    assert directory.publish_blocks(lease, 2, [Removed(blocks(2)), Stored(blocks(3))], 0) == 4
    assert directory.state.events_since(revision) == [BlocksChanged("w", 1, (Stored(blocks(3)),))]
    with pytest.raises(SequenceGapError) as caught:
        directory.publish_blocks(lease, 5, [Stored(blocks(4))], 0)
    assert (caught.value.expected, caught.value.got) == (4, 5)
    assert directory.state.longest_prefix(block(4)) == []
    assert directory.publish_blocks(lease, 5, [Cleared(), Stored(blocks(4))], 0) == 7
    assert directory.state.longest_prefix(block(4)) == [(worker(), Prefix(1, 1))]
    assert directory.state.longest_prefix(block(1)) == []


def test_broken_hashes_change_nothing() -> None:
    directory = make()
    lease = directory.register(worker(), 5, 0)
    with pytest.raises(ValueError, match="16 bytes"):
        directory.publish_blocks(lease, 1, [Stored(blocks(1)), Stored(b"short")], 0)
    assert directory.state.index.num_entries == 0
    assert directory.publish_blocks(lease, 1, [Stored(blocks(1))], 0) == 2


def test_history_is_bounded_and_says_when_it_is_too_short() -> None:
    directory = make(max_events=3)
    lease = directory.register(worker(), 5, 0)
    for n in range(5):
        directory.keep_alive(lease, str(n).encode(), 0)
    assert directory.state.revision == START + 6
    assert directory.state.events_since(START + 2) is None
    assert [e.load for e in directory.state.events_since(START + 3) or () if isinstance(e, LoadChanged)] == [
        b"2",
        b"3",
        b"4",
    ]
    assert directory.state.events_since(directory.state.revision) == []
    assert directory.state.events_since(directory.state.revision + 1) is None
    assert directory.state.events_since(START - 500) is None
    directory.check_integrity()


def test_history_is_bounded_in_bytes() -> None:
    directory = make(max_history_nbytes=10_000)
    lease = directory.register(worker(), 5, 0)
    for n in range(50):
        directory.publish_blocks(lease, n + 1, [Stored(blocks(*range(100)))], 0)
    kept = next(n for n in range(50) if directory.state.events_since(directory.state.revision - n - 1) is None)
    assert 0 < kept * event_nbytes(BlocksChanged("w", 1, (Stored(blocks(*range(100))),))) <= 10_000
    directory.check_integrity()


def test_a_snapshot_begins_with_all_who_joined_and_splits_many_blocks() -> None:
    directory = make()
    for name in ("a", "b"):
        lease = directory.register(worker(name), 5, 0)
        directory.publish_blocks(lease, 1, [Stored(blocks(*range(40_000)))], 0)
    snapshot = directory.state.snapshot()
    assert [type(event) for event in snapshot] == [Joined] * 2 + [BlocksChanged] * 4
    assert all(event_nbytes(event) < 1 << 20 for event in snapshot)


def held_in(change: Stored | Removed) -> set[tuple[Tier, bytes]]:
    return {(change.tier, change.hashes[i : i + 16]) for i in range(0, len(change.hashes), 16)}


NUMBERS = st.lists(st.integers(0, 5), max_size=4).map(lambda numbers: blocks(*numbers))


class Watcher:
    """What someone knows who has applied events and nothing else."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.blocks: dict[str, set[tuple[Tier, bytes]]] = {}

    def apply(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Joined(joined):
                    assert joined.worker_id not in self.workers, "joined twice"
                    self.workers[joined.worker_id], self.blocks[joined.worker_id] = joined, set()
                case Left(worker_id, incarnation, _):
                    assert self.workers.pop(worker_id).incarnation == incarnation
                    del self.blocks[worker_id]
                case LoadChanged(worker_id, incarnation, load):
                    assert self.workers[worker_id].incarnation == incarnation
                    self.workers[worker_id] = replace(self.workers[worker_id], load=load)
                case BlocksChanged(worker_id, incarnation, changes):
                    assert self.workers[worker_id].incarnation == incarnation
                    for change in changes:
                        if isinstance(change, Cleared):
                            self.blocks[worker_id].clear()
                            continue
                        hashes = held_in(change)
                        if isinstance(change, Stored):
                            self.blocks[worker_id] |= hashes
                        else:
                            self.blocks[worker_id] -= hashes


class DirectoryMachine(RuleBasedStateMachine):
    """The directory against a naive account of it, and against watchers of its events and its snapshots."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = make(max_events=12)
        self.now_s = 0.0
        # worker_id -> (worker, lease, ttl, expiry, next sequence, blocks)
        self.model: dict[str, tuple[Worker, int, float, float, int, set[tuple[Tier, bytes]]]] = {}
        self.dead_leases: list[int] = []
        self.watcher = Watcher()
        self.seen = START
        self.incarnations = itertools.count(1)

    def _drop_expired(self) -> None:
        for worker_id, entry in list(self.model.items()):
            if entry[3] <= self.now_s:
                self.dead_leases.append(entry[1])
                del self.model[worker_id]

    @rule(name=st.sampled_from("abc"), ttl_s=st.integers(1, 5))
    def register_new(self, name: str, ttl_s: int) -> None:
        self._drop_expired()
        new = worker(name, next(self.incarnations))
        if name in self.model:
            self.dead_leases.append(self.model[name][1])
        lease = self.directory.register(new, ttl_s, self.now_s)
        self.model[name] = (new, lease, ttl_s, self.now_s + ttl_s, 1, set())

    @precondition(lambda self: self.model)
    @rule(data=st.data(), load=st.sampled_from([b"x", b"y"]))
    def keep_alive(self, data: st.DataObject, load: bytes) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        known, lease, ttl_s, expiry_s, sequence, held = self.model[name]
        if expiry_s <= self.now_s:
            with pytest.raises(UnknownLeaseError):
                self.directory.keep_alive(lease, load, self.now_s)
            self._drop_expired()
        else:
            assert self.directory.keep_alive(lease, load, self.now_s) == ttl_s
            self.model[name] = (replace(known, load=load), lease, ttl_s, self.now_s + ttl_s, sequence, held)

    @precondition(lambda self: self.model)
    @rule(
        data=st.data(),
        change=st.one_of(
            st.builds(Stored, NUMBERS, st.sampled_from(Tier)),
            st.builds(Removed, NUMBERS, st.sampled_from(Tier)),
            st.just(Cleared()),
        ),
        skew=st.integers(-1, 1),
    )
    def publish(self, data: st.DataObject, change: Stored | Removed | Cleared, skew: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        known, lease, ttl_s, expiry_s, sequence, held = self.model[name]
        if expiry_s <= self.now_s or sequence + skew < 1:
            return
        if skew == 1 and not isinstance(change, Cleared):
            with pytest.raises(SequenceGapError):
                self.directory.publish_blocks(lease, sequence + skew, [change], self.now_s)
            return
        expected = sequence if skew == -1 else sequence + skew + 1
        assert self.directory.publish_blocks(lease, sequence + skew, [change], self.now_s) == expected
        if skew >= 0:
            match change:
                case Cleared():
                    held = set()
                case Stored():
                    held = held | held_in(change)
                case Removed():
                    held = held - held_in(change)
        self.model[name] = (known, lease, ttl_s, expiry_s, expected, held)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def deregister(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.dead_leases.append(self.model[name][1])
        self.directory.deregister(self.model[name][1])
        del self.model[name]

    @rule(delay_s=st.sampled_from([0.5, 1, 3]))
    def time_passes(self, delay_s: float) -> None:
        self.now_s += delay_s
        self.directory.expire(self.now_s)
        self._drop_expired()

    @precondition(lambda self: self.dead_leases)
    @rule(data=st.data())
    def dead_leases_stay_dead(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.dead_leases))
        with pytest.raises(UnknownLeaseError):
            self.directory.keep_alive(lease, b"", self.now_s)

    @rule()
    def watch(self) -> None:
        events = self.directory.state.events_since(self.seen)
        if events is None:
            assert self.directory.state.revision - self.seen > 12, "the history is shorter than promised"
            self.watcher = Watcher()
            events = self.directory.state.snapshot()
        self.watcher.apply(events)
        self.seen = self.directory.state.revision
        assert self.watcher.workers == dict(self.directory.state.workers)
        assert self.watcher.blocks == {name: entry[5] for name, entry in self.model.items()}

    @invariant()
    def agrees(self) -> None:
        self.directory.check_integrity()
        assert dict(self.directory.state.workers) == {name: e[0] for name, e in self.model.items()}
        for n in range(6):
            expected = {
                name: Prefix(1, int((Tier.DEVICE, block(n)) in entry[5]))
                for name, entry in self.model.items()
                if any((tier, block(n)) in entry[5] for tier in Tier)
            }
            assert {w.worker_id: prefix for w, prefix in self.directory.state.longest_prefix(block(n))} == expected


TestDirectoryMachine = DirectoryMachine.TestCase
TestDirectoryMachine.settings = settings(max_examples=60, stateful_step_count=40)
