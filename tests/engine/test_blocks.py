"""The block pool against every order of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.engine.blocks import BlockPool, CacheChange, OutOfBlocksError

NUM_BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Keeps its own, naive account of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[list[int]] = []
        self.lent: list[list[int]] = []
        self.quarantined: list[list[int]] = []
        self.names = 0
        self.known: set[bytes] = set()

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        available = self.pool.num_available
        try:
            blocks = self.pool.allocate(count)
        except OutOfBlocksError:
            assert count > available
            return
        others = {b for group in (*self.held, *self.lent, *self.quarantined) for b in group}
        assert not others & set(blocks), "a block in use was handed out"
        self.held.append(blocks)

    @rule(count=st.integers(0, 5))
    def lend(self, count: int) -> None:
        if count <= self.pool.num_available:
            blocks = self.pool.lend(count)
            others = {b for group in (*self.held, *self.lent, *self.quarantined) for b in group}
            assert not others & set(blocks), "a block in use was lent"
            self.lent.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.held))
        self.pool.acquire(group)
        self.held.append(list(group))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remember(self, data: st.DataObject) -> None:
        for block in data.draw(st.sampled_from(self.held)):
            self.names += 1
            self.pool.remember(block, b"%d" % self.names)

    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        if self.known:
            blocks = self.pool.match([data.draw(st.sampled_from(sorted(self.known)))])
            assert len(blocks) == 1
            self.pool.acquire(blocks)
            self.held.append(blocks)

    @precondition(lambda self: self.lent)
    @rule(commit=st.booleans())
    def end_lending(self, commit: bool) -> None:
        blocks = self.lent.pop()
        if commit:
            self.pool.settle(blocks)
            self.held.append(blocks)
        else:
            self.pool.quarantine(blocks)
            self.quarantined.append(blocks)

    @precondition(lambda self: self.quarantined)
    @rule()
    def prove(self) -> None:
        self.pool.restore(self.quarantined.pop())

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity()
        counts = self.pool.counts()
        assert counts.free + counts.active + counts.cached + counts.lent + counts.quarantined == counts.total
        assert counts.lent == sum(map(len, self.lent))
        assert counts.quarantined == sum(map(len, self.quarantined))
        assert counts.active == len({b for group in self.held for b in group})
        for change in self.pool.take_changes():
            (self.known.add if change.stored else self.known.remove)(change.hash)
        assert self.known == set(self.pool.hashes())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    for i, block in enumerate(blocks):
        pool.remember(block, b"%d" % i)
    pool.release(blocks)
    pool.allocate(2)
    assert pool.match([b"0", b"1", b"2"]) == blocks[:2]


def test_lent_blocks_do_not_come_back_without_proof() -> None:
    pool = BlockPool(2)
    lent = pool.lend(2)
    pool.quarantine(lent)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(1)
    pool.restore(lent)
    assert sorted(pool.allocate(2)) == [0, 1]


def test_a_content_known_twice_keeps_its_first_block() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.remember(first, b"same")
    pool.remember(second, b"same")
    pool.release([first, second])
    assert pool.match([b"same"]) == [first]
    assert pool.take_changes() == [CacheChange(b"same", stored=True)]
