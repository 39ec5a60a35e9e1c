"""A copy that is read in parts while others write, from a log that is trimmed and loses its end, is right or is none."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.directory.events import (
    BlockChange,
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
)
from services.directory.replica import Entry, LogBrokenError, Replica
from services.directory.state import ClusterState
from services.runtime.tier import Tier


def block(n: int) -> bytes:
    return n.to_bytes(16, "big")


def worker(name: str, incarnation: int = 1, load: bytes = b"") -> Worker:
    return Worker(name, incarnation, Role.DECODE, name.encode(), load)


@dataclass
class Held:
    """What the store has at one moment."""

    head: int = 1
    workers: dict[str, Worker] = field(default_factory=dict)
    blocks: dict[str, set[bytes]] = field(default_factory=dict)
    accounts: dict[str, list[BlockChange]] = field(default_factory=dict)
    log: list[Entry] = field(default_factory=list)


class ReplicaMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = Held()
        self.saved = copy.deepcopy(self.store)
        self.clock = 1
        self.life = 1
        # revision -> what was true then; none ever comes twice
        self.truth = {1: self.facts()}
        self.replica = Replica(lambda revision: ClusterState(revision, max_events=4))
        # Workers and how far their accounts were read; None: nothing is being read.
        self.reading: dict[str, int] | None = None
        self.is_complete = False

    def facts(self) -> tuple[dict[str, Worker], dict[str, set[bytes]]]:
        return copy.deepcopy((self.store.workers, self.store.blocks))

    def append(self, event: Event) -> None:
        self.clock += 1
        revision, store = self.clock, self.store
        match event:
            case Joined(who):
                store.workers[who.worker_id], store.blocks[who.worker_id] = who, set()
                store.accounts[who.worker_id] = []
            case Left(name):
                del store.workers[name], store.blocks[name], store.accounts[name]
            case LoadChanged(name, incarnation, load):
                store.workers[name] = worker(name, incarnation, load)
            case BlocksChanged(name, _, (change,)):
                held = store.blocks[name]
                match change:
                    case Stored(hashes):
                        held.add(hashes)
                    case Removed(hashes):
                        held.discard(hashes)
                    case Cleared():
                        held.clear()
                        store.accounts[name].clear()
                store.accounts[name].append(change)
        store.log.append(Entry(store.head, revision, (event,)))
        store.head = revision
        self.truth[revision] = self.facts()

    @rule(
        name=st.sampled_from("ab"), what=st.sampled_from(["join", "leave", "load", "s", "r", "c"]), n=st.integers(0, 3)
    )
    def write(self, name: str, what: str, n: int) -> None:
        present = self.store.workers.get(name)
        if present is None or what == "join":
            if present is not None:
                self.append(Left(name, present.incarnation, LeaveReason.REPLACED))
            self.append(Joined(worker(name, self.clock)))
        elif what == "leave":
            self.append(Left(name, present.incarnation, LeaveReason.EXPIRED))
        elif what == "load":
            self.append(LoadChanged(name, present.incarnation, bytes([n])))
        else:
            change: BlockChange = {"s": Stored(block(n)), "r": Removed(block(n)), "c": Cleared()}[what]
            self.append(BlocksChanged(name, present.incarnation, (change,)))

    @rule(keep=st.integers(0, 6))
    def trim(self, keep: int) -> None:
        self.store.log = self.store.log[len(self.store.log) - min(keep, len(self.store.log)) :]

    @rule()
    def save(self) -> None:
        self.saved = copy.deepcopy(self.store)

    @rule()
    def crash(self) -> None:
        """What was not saved is gone; revisions go on from later."""
        self.store = copy.deepcopy(self.saved)
        self.clock += 10
        self.life += 1

    @rule()
    def begin(self) -> None:
        self.replica.begin(self.store.head, list(self.store.workers.values()), str(self.life))
        self.reading, self.is_complete = dict.fromkeys(self.store.workers, 0), False

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), count=st.integers(1, 3))
    def read_blocks(self, data: st.DataObject, count: int) -> None:
        assert self.reading is not None
        name = data.draw(st.sampled_from(sorted(self.reading)))
        start = self.reading[name]
        part = self.store.accounts.get(name, [])[start : start + count]
        if part:
            self.replica.add_blocks(name, part)
            self.reading[name] += len(part)
        else:
            del self.reading[name]

    @precondition(lambda self: self.reading == {})
    @rule()
    def complete(self) -> None:
        self.reading = None
        try:
            self.replica.complete(self.store.head, str(self.life))
            self.is_complete = True
        except LogBrokenError:
            self.replica.drop()

    @precondition(lambda self: self.is_complete)
    @rule(count=st.integers(1, 4))
    def follow(self, count: int) -> None:
        """As whoever reads the log does: its next entries, or its head where there are none."""
        seen = self.replica.revision
        entries = [entry for entry in self.store.log if entry.revision > seen][:count]
        try:
            for entry in entries:
                self.replica.take(entry)
            if not entries:
                self.replica.check_head(self.store.head)
                if self.replica.is_behind(self.store.head):
                    raise LogBrokenError("trimmed")
                assert self.replica.revision == self.store.head
        except LogBrokenError:
            self.replica.drop()
            self.is_complete = False

    @invariant()
    def is_right_or_none(self) -> None:
        state = self.replica.state
        if state is None:
            return
        workers, blocks = self.truth[state.revision]
        assert dict(state.workers) == workers
        assert {name: set(state.index.held_by(name, Tier.DEVICE, 1)) for name in workers} == blocks
        state.check_integrity()


TestReplicaMachine = ReplicaMachine.TestCase
TestReplicaMachine.settings = settings(max_examples=60, stateful_step_count=50)


def test_nothing_is_shown_before_all_is_read() -> None:
    replica = Replica(ClusterState)
    assert replica.state is None
    assert not replica.is_read
    replica.begin(5, [worker("a")], "1")
    replica.add_blocks("a", [Stored(block(1))])
    assert replica.state is None
    assert not replica.is_read
    replica.complete(7, "1")
    assert replica.state is None
    replica.take(Entry(5, 6, (LoadChanged("a", 1, b"x"),)))
    assert replica.state is None
    replica.take(Entry(6, 7, (BlocksChanged("a", 1, (Removed(block(1)),)),)))
    assert replica.state is not None
    assert not replica.state.index.num_entries


def test_a_gap_changes_nothing() -> None:
    replica = Replica(ClusterState)
    replica.begin(5, [], "1")
    replica.complete(5, "1")
    with pytest.raises(LogBrokenError):
        replica.take(Entry(6, 7, (Joined(worker("a")),)))
    assert replica.state is not None
    assert not replica.state.workers
    with pytest.raises(LogBrokenError):
        replica.check_head(4)
