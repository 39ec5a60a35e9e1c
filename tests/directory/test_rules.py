"""The rules in Lua against those in Python, call by call; and what is read back from the store against what was told."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from services.directory import redis_link
from services.directory.core import (
    Directory,
    IncarnationReusedError,
    ReplacedError,
    SequenceGapError,
    UnknownLeaseError,
)
from services.directory.events import BlockChange, Cleared, Removed, Role, Stored, Worker
from services.directory.redis_link import RedisLink
from services.directory.replica import Replica
from services.directory.state import ClusterState
from services.runtime.tier import Tier
from tests.directory.redis_server import RedisServer

T = TypeVar("T")

TTL_S = 1_000.0
NAMES = st.sampled_from("abc")
HASHES = st.lists(st.integers(0, 5), max_size=3).map(lambda ns: b"".join(n.to_bytes(16, "big") for n in ns))
CHANGES = st.lists(
    st.one_of(
        st.builds(Stored, HASHES, st.sampled_from(Tier)),
        st.builds(Removed, HASHES, st.sampled_from(Tier)),
        st.just(Cleared()),
    ),
    max_size=4,
)
LOADS = st.sampled_from([b"", b"x", bytes(range(256))])


def new_replica() -> Replica:
    return Replica(ClusterState)


def held(state: ClusterState) -> dict[str, dict[Tier, set[bytes]]]:
    return {
        name: {
            tier: {part[i : i + 16] for part in state.index.held_by(name, tier, 100) for i in range(0, len(part), 16)}
            for tier in Tier
        }
        for name in state.workers
    }


async def read(link: RedisLink) -> Replica:
    replica, life = new_replica(), await link.life()
    head, workers = await link.workers()
    replica.begin(head, workers, life)
    for worker in workers:
        async for changes in link.blocks(worker.worker_id):
            replica.add_blocks(worker.worker_id, changes)
    replica.complete(await link.head(), await link.life())
    return replica


class RulesMachine(RuleBasedStateMachine):
    def __init__(self, server: RedisServer) -> None:
        super().__init__()
        with server.client() as client:
            client.flushall()
        self.server = server
        self.runner = asyncio.Runner()
        self.link = self.run(self.connected())
        self.directory = Directory(ClusterState(1), itertools.count(1))
        self.now_s = 0.0
        self.lease_ids = itertools.count(1_000)
        # All that were ever given: here and there.
        self.leases: list[tuple[int, int]] = []
        self.copy = self.run(read(self.link))

    async def connected(self) -> RedisLink:
        return RedisLink(self.server.url, max_events=10_000)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.run(self.link.close())
        self.runner.close()

    @rule(name=NAMES, incarnation=st.integers(1, 4), other=st.sampled_from(["", "", "", "!"]), load=LOADS)
    def register(self, name: str, incarnation: int, other: str, load: bytes) -> None:
        worker = Worker(name, incarnation, Role.DECODE, f"{name}/{incarnation}{other}".encode(), load)
        lease_id = next(self.lease_ids)
        answer = self.run(self.link.register(worker, TTL_S, lease_id))
        try:
            here = self.directory.register(worker, TTL_S, self.now_s)
        except ReplacedError:
            present = self.directory.state.workers[name].incarnation
            assert answer == [b"replaced", str(present).encode()]
        except IncarnationReusedError:
            assert answer == [b"reused"]
        else:
            assert answer[0] == b"ok"
            self.leases.append((here, lease_id))
        self.agree()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), load=LOADS)
    def keep_alive(self, data: st.DataObject, load: bytes) -> None:
        here, there = data.draw(st.sampled_from(self.leases))
        answer = self.run(self.link.keep_alive(there, load))
        try:
            ttl_s = self.directory.keep_alive(here, load, self.now_s)
        except UnknownLeaseError:
            assert answer == [b"unknown"]
        else:
            assert answer[:2] == [b"ok", str(round(ttl_s * 1000)).encode()]
        self.agree()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def deregister(self, data: st.DataObject) -> None:
        here, there = data.draw(st.sampled_from(self.leases))
        assert self.run(self.link.deregister(there))[0] == b"ok"
        self.directory.deregister(here)
        self.agree()

    # The latest lease is drawn most: dead ones say no more than that they are.
    @precondition(lambda self: self.leases)
    @rule(data=st.data(), first=st.integers(1, 8), changes=CHANGES)
    def publish(self, data: st.DataObject, first: int, changes: list[BlockChange]) -> None:
        here, there = data.draw(st.sampled_from(self.leases[-3:]))
        self.published(here, there, first, changes)

    @precondition(lambda self: self.leases)
    @rule(changes=CHANGES)
    def publish_next(self, changes: list[BlockChange]) -> None:
        here, there = self.leases[-1]
        member = self.directory._by_lease.get(here)
        self.published(here, there, member.next_sequence if member else 1, changes)

    def published(self, here: int, there: int, first: int, changes: list[BlockChange]) -> None:
        answer = self.run(self.link.publish(there, first, changes))
        try:
            following = self.directory.publish_blocks(here, first, changes, self.now_s)
        except UnknownLeaseError:
            assert answer == [b"unknown"]
        except SequenceGapError:
            expected = self.directory._by_lease[here].next_sequence
            assert answer == [b"gap", str(expected).encode()]
        else:
            assert answer[:2] == [b"ok", str(following).encode()]
        self.agree()

    @rule(name=NAMES)
    def expire(self, name: str) -> None:
        """One lease runs out, the others are renewed in time."""
        for delay_s in (0, TTL_S - 1, 1):
            self.now_s += delay_s
            for member in list(self.directory._members.values()):
                if member.worker_id != name:
                    load = self.directory.state.workers[member.worker_id].load
                    self.directory.keep_alive(member.lease_id, load, self.now_s)
        was_there = name in self.directory.state.workers
        self.directory.expire(self.now_s)
        with self.server.client() as client:
            if (lease := client.hget(f"kvferry:worker:{name}", "lease")) is not None:
                client.delete(f"kvferry:lease:{lease.decode()}")
        assert self.run(self.link.look()) == was_there
        self.agree()

    @rule()
    def read_anew(self) -> None:
        self.copy = self.run(read(self.link))
        self.agree()

    def agree(self) -> None:
        """What the log says and what can be read, with what was told here."""
        before = self.seen if hasattr(self, "seen") else 1
        happened = self.run(self.link.entries_after(self.copy.revision, 0))
        for entry in happened:
            self.copy.take(entry)
        assert [e for entry in happened for e in entry.events] == self.directory.state.events_since(before)
        self.seen = self.directory.state.revision
        for state in (self.copy.state, self.run(read(self.link)).state):
            assert state is not None
            assert state.workers == self.directory.state.workers
            assert held(state) == held(self.directory.state)
            state.check_integrity()


def test_redis_and_memory_have_the_same_rules(redis_server: RedisServer) -> None:
    run_state_machine_as_test(
        lambda: RulesMachine(redis_server), settings=settings(max_examples=12, stateful_step_count=30)
    )


async def test_an_account_that_grows_long_is_begun_anew(redis_server: RedisServer, monkeypatch: Any) -> None:
    monkeypatch.setattr(redis_link, "_MIN_REMOVED_NBYTES", 1_000)
    link = RedisLink(redis_server.url, max_events=100)
    await link.register(Worker("a", 1, Role.DECODE, b"", b""), 60, 7)
    sequence, hashes = 1, bytes(16 * 20)
    for _ in range(4):
        for change in (Stored(hashes), Removed(hashes)):
            answer = await link.publish(7, sequence, [change])
            if answer == [b"snapshot"]:
                break
            sequence = int(answer[1])
    assert answer == [b"snapshot"]
    assert (await read(link)).state is not None
    with redis_server.client() as client:
        long = sum(map(len, client.lrange("kvferry:blocks:a", 0, -1)))
        answer = await link.publish(7, sequence, [Cleared(), Stored(hashes)])
        assert answer[0] == b"ok"
        assert sum(map(len, client.lrange("kvferry:blocks:a", 0, -1))) < long / 2
    replica = await read(link)
    assert replica.state is not None
    assert held(replica.state)["a"][Tier.DEVICE] == {bytes(16)}
    await link.close()


async def test_an_account_of_many_parts_is_read_whole(redis_server: RedisServer, monkeypatch: Any) -> None:
    monkeypatch.setattr(redis_link, "_READ_ENTRIES", 4)
    monkeypatch.setattr(redis_link, "_MAX_READ_ENTRIES", 32)
    link = RedisLink(redis_server.url, max_events=100)
    await link.register(Worker("a", 1, Role.DECODE, b"", b""), 60, 7)
    hashes = [n.to_bytes(16, "big") for n in range(200)]
    for n, hash_ in enumerate(hashes):
        await link.publish(7, n + 1, [Stored(hash_)])
    replica = await read(link)
    assert replica.state is not None
    assert held(replica.state)["a"][Tier.DEVICE] == set(hashes)
    await link.close()


async def test_the_log_is_bounded(redis_server: RedisServer, monkeypatch: Any) -> None:
    monkeypatch.setattr(redis_link, "_MAX_LOG_NBYTES", 20_000)
    few, many = RedisLink(redis_server.url, max_events=5), RedisLink(redis_server.url, max_events=1_000)
    await few.register(Worker("a", 1, Role.DECODE, b"", b""), 60, 7)
    for n in range(20):
        await few.publish(7, n + 1, [Stored(bytes(16))])
    with redis_server.client() as client:
        assert client.xlen("kvferry:log") == 5
        for n in range(20, 60):
            await many.publish(7, n + 1, [Stored(bytes(1_600))])
        assert 5 < client.xlen("kvferry:log") < 20_000 / 1_600
        kept = sum(int(fields[b"nbytes"]) for _, fields in client.xrange("kvferry:log"))
        assert int(client.get("kvferry:log_nbytes")) == kept <= 20_000
    for link in (few, many):
        await link.close()
