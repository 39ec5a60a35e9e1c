"""The host tier against every order of calls, with memory that shows whether a copy was torn."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.engine.blocks import BlockPool, CacheChange
from services.engine.host_tier import MAX_SAVED_AT_ONCE, Copy, Direction, HostTier
from services.runtime.tier import Tier

NUM_BLOCKS = 8
Halves = tuple[bytes, bytes]


class TierMachine(RuleBasedStateMachine):
    """A block's memory has two halves: a copy reads one of them when it begins and the other when it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.names = 0
        self.pool = BlockPool(NUM_BLOCKS)
        self.device: list[Halves] = [(b"", b"")] * NUM_BLOCKS
        self.held: list[list[int]] = []
        self.begun: list[tuple[Copy, list[bytes]]] = []
        self.loading: dict[int, tuple[list[bytes], list[int]]] = {}
        self.known: dict[Tier, set[bytes]] = {tier: set() for tier in Tier}

    @initialize(num_slots=st.integers(0, 20))
    def make(self, num_slots: int) -> None:
        self.tier = HostTier(self.pool, num_slots)
        self.host: list[Halves] = [(b"", b"")] * num_slots

    def write(self, block: int, hash_: bytes) -> None:
        self.device[block] = (hash_, hash_)

    @rule(count=st.integers(1, 5))
    def compute(self, count: int) -> None:
        """A sequence that computes blocks of its own, over whatever was evicted for it."""
        if count > self.pool.num_available:
            return
        blocks = self.pool.allocate(count)
        for block in blocks:
            self.names += 1
            self.write(block, b"%d" % self.names)
            self.pool.remember(block, b"%d" % self.names)
        self.held.append(blocks)

    @rule(data=st.data())
    def compute_again(self, data: st.DataObject) -> None:
        """What was evicted, perhaps into the very block that it was in."""
        gone = self.known[Tier.HOST] - self.known[Tier.DEVICE]
        if gone and self.pool.num_available:
            hash_ = data.draw(st.sampled_from(sorted(gone)))
            (block,) = self.pool.allocate(1)
            self.write(block, hash_)
            self.pool.remember(block, hash_)
            self.held.append([block])

    @precondition(lambda self: self.pool.num_available)
    @rule()
    def lend(self) -> None:
        (block,) = self.pool.lend(1)
        self.write(block, b"a peer's")
        self.pool.quarantine([block])
        self.pool.restore([block])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        if self.known[Tier.DEVICE]:
            block = self.pool.find(data.draw(st.sampled_from(sorted(self.known[Tier.DEVICE]))))
            assert block is not None
            self.pool.acquire([block])
            self.held.append([block])

    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        found = sorted(self.known[Tier.HOST] - self.known[Tier.DEVICE])
        if not found:
            return
        hashes = data.draw(st.lists(st.sampled_from(found), min_size=1, max_size=3, unique=True))
        if len(hashes) <= self.pool.num_available:
            blocks = self.pool.allocate(len(hashes))
            for block in blocks:
                self.write(block, b"to be loaded")
            copy = self.tier.load(hashes, blocks)
            self.loading[copy.id] = (hashes, blocks)

    @rule()
    def begin(self) -> None:
        copies = self.tier.take_copies()
        assert sum(copy.direction is Direction.DOWN for copy in copies) <= 1
        for copy in copies:
            assert len(copy.blocks) <= MAX_SAVED_AT_ONCE
            self.begun.append((copy, [first for first, _ in self._sources(copy)]))

    @precondition(lambda self: self.begun)
    @rule(data=st.data(), ok=st.booleans())
    def end(self, data: st.DataObject, ok: bool) -> None:
        copy, firsts = self.begun.pop(data.draw(st.integers(0, len(self.begun) - 1)))
        seconds = [second for _, second in self._sources(copy)]
        into, places = (self.host, copy.slots) if copy.direction is Direction.DOWN else (self.device, copy.blocks)
        for place, half, other in zip(places, firsts, seconds, strict=True):
            into[place] = (half, other) if ok else (half, b"torn")
        self.tier.end(copy, ok=ok)
        if copy.direction is Direction.UP:
            hashes, blocks = self.loading.pop(copy.id)
            if ok:
                assert [self.device[b] for b in blocks] == [(h, h) for h in hashes]
                for block, hash_ in zip(blocks, hashes, strict=True):
                    self.pool.remember(block, hash_)
            self.held.append(blocks)

    def _sources(self, copy: Copy) -> Iterable[Halves]:
        if copy.direction is Direction.DOWN:
            return [self.device[block] for block in copy.blocks]
        return [self.host[slot] for slot in copy.slots]

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "tier"):
            return
        changes = self.pool.take_changes()
        self.tier.note(changes)
        self.pool.check_integrity()
        self.tier.check_integrity()
        counts = self.tier.counts()
        assert counts.free + counts.filling + counts.held == counts.total
        for change in [*changes, *self.tier.take_changes()]:
            (self.known[change.tier].add if change.stored else self.known[change.tier].remove)(change.hash)
        assert self.known[Tier.DEVICE] == set(self.pool.hashes())
        assert self.known[Tier.HOST] == set(self.tier.hashes())
        for hash_ in self.pool.hashes():
            block = self.pool.find(hash_)
            assert block is not None
            assert self.device[block] == (hash_, hash_), "the pool's index is wrong"
        slots = {slot: hash_ for slot, hash_ in enumerate(self.tier._hash) if hash_ is not None}
        assert all(self.host[slot] == (hash_, hash_) for slot, hash_ in slots.items()), "the host holds a torn block"


TestTier = TierMachine.TestCase
TestTier.settings = settings(max_examples=80, stateful_step_count=50)


def filled(num_blocks: int, num_slots: int) -> tuple[BlockPool, HostTier]:
    """A pool that has cached a chain of blocks "0", "1" ... of one sequence, none of them saved yet."""
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(num_blocks)
    for i, block in enumerate(blocks):
        pool.remember(block, b"%d" % i)
    pool.release(blocks)
    return pool, HostTier(pool, num_slots)


def save_all(pool: BlockPool, tier: HostTier) -> list[Copy]:
    made = []
    while True:
        tier.note(pool.take_changes())
        copies = tier.take_copies()
        if not copies:
            tier.check_integrity()
            return made
        (copy,) = copies
        tier.end(copy, ok=True)
        made.append(copy)


def test_everything_is_saved_ahead_where_there_is_room_and_once() -> None:
    pool, tier = filled(80, 160)
    made = save_all(pool, tier)
    assert [len(copy.blocks) for copy in made] == [32, 32, 16]
    assert set(tier.hashes()) == set(pool.hashes())
    pool.allocate(70)
    assert save_all(pool, tier) == []
    assert tier.totals.lost == 0
    copy = tier.load([b"79"], [0])
    tier.end(copy, ok=True)
    assert (tier.totals.saved, tier.totals.loaded) == (80, 1)


def test_what_is_in_use_is_saved_after_what_is_about_to_be_evicted() -> None:
    """Released and evicted at once, as in a pool that is full of running sequences, it is not lost."""
    pool = BlockPool(40)
    tier = HostTier(pool, 80)
    running, ended = pool.allocate(30), pool.allocate(10)
    for i, block in enumerate([*running, *ended]):
        pool.remember(block, b"%d" % i)
    pool.release(ended)
    first, second = save_all(pool, tier)
    assert list(first.blocks) == [*reversed(ended), *running[:22]]
    assert list(second.blocks) == running[22:]
    pool.release(running)
    pool.allocate(40)
    tier.note(pool.take_changes())
    assert tier.totals.lost == 0


def test_what_is_in_use_leaves_room_for_what_was_evicted() -> None:
    pool = BlockPool(40)
    tier = HostTier(pool, 20)
    for i, block in enumerate(pool.allocate(40)):
        pool.remember(block, b"%d" % i)
    save_all(pool, tier)
    assert tier.hashes() == [b"%d" % i for i in range(10)]


def test_a_small_host_keeps_what_the_pool_has_evicted() -> None:
    """At most half of its slots copy what the pool still has."""
    pool, tier = filled(40, 8)
    assert sum(len(copy.blocks) for copy in save_all(pool, tier)) == 4
    for _ in range(4):
        pool.allocate(1)
        save_all(pool, tier)
    # The end of the sequence is evicted first.
    assert tier.hashes() == [b"%d" % i for i in range(39, 31, -1)]
    assert pool.match([b"%d" % i for i in range(40)])[-1] == 35, "half of what is held is not in the pool any more"


def test_the_least_recently_used_is_evicted_and_nothing_that_is_read() -> None:
    pool, tier = filled(4, 4)
    save_all(pool, tier)
    blocks = pool.allocate(2)
    save_all(pool, tier)
    assert tier.hashes() == [b"3", b"2", b"1", b"0"]
    copy = tier.load([b"3"], blocks[:1])
    assert tier.take_copies() == [copy]
    blocks += pool.allocate(2)
    for i, block in enumerate(blocks):
        pool.remember(block, b"new%d" % i)
    pool.release(blocks)
    save_all(pool, tier)
    assert set(tier.hashes()) == {b"3", b"0", b"new3", b"new2"}
    tier.end(copy, ok=False)
    assert tier.totals.failed_copies == 1
    assert CacheChange(b"2", stored=False, tier=Tier.HOST) in tier.take_changes()


def test_a_block_that_was_evicted_and_computed_again_in_its_place_does_not_count_as_copied() -> None:
    pool, tier = filled(2, 4)
    (copy,) = tier.take_copies()
    taken = pool.allocate(2)
    for block, hash_ in zip(taken, (b"1", b"0"), strict=True):
        pool.remember(block, hash_)
    assert {block: pool.content(block).hash for block in copy.blocks} == {1: b"1", 0: b"0"}  # type: ignore[union-attr]
    tier.end(copy, ok=True)
    assert tier.hashes() == []
    assert tier.counts().free == 4


def test_without_slots_nothing_is_copied() -> None:
    pool, tier = filled(4, 0)
    assert tier.take_copies() == []
    pool.allocate(4)
    tier.note(pool.take_changes())
    assert tier.totals.lost == 0
