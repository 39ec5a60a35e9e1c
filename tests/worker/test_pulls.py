"""Pulls against every order of reads, stops, evictions and other users: no block that a read may still write into is
anybody else's, only what is proven is cached, every block and reference comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.engine.blocks import BlockPool, OutOfBlocksError
from services.worker.pulls import Pull, PullBook, PullState, TooManyPullsError, stood

NUM_BLOCKS = 10
MAX_PULLS = 3
CHAINS = [[b"%d.%d" % (chain, i) for i in range(6)] for chain in range(3)]


class PullMachine(RuleBasedStateMachine):
    """Keeps its own account: what lies in each block, the reads that may still write, and blocks that sequences hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.pulls = PullBook(self.pool, max_pulls=MAX_PULLS)
        self.content: list[bytes] = [b""] * NUM_BLOCKS
        self.reads: dict[Pull, bool] = {}  # that may still write, and whether what they bring is good
        self.ended: dict[Pull, bool] = {}
        self.mine: list[list[int]] = []
        self.asking: list[Pull] = []

    def writable(self) -> set[int]:
        return {block for pull in self.reads for block in pull.blocks}

    @rule(chain=st.sampled_from(CHAINS), count=st.integers(1, 6), keep=st.booleans())
    def compute(self, chain: list[bytes], count: int, keep: bool) -> None:
        """A sequence takes what is cached of a chain and computes the rest, evicting what it needs."""
        cached = self.pool.match(chain[:count])
        self.pool.acquire(cached)
        try:
            fresh = self.pool.allocate(count - len(cached))
        except OutOfBlocksError:
            self.pool.release(cached)
            return
        assert not self.writable() & {*cached, *fresh}, "a block that a read may write into was handed out"
        for block, hash_ in zip(fresh, chain[len(cached) :], strict=False):
            self.content[block] = hash_
            self.pool.remember(block, hash_)
        self.mine.append(cached + fresh)
        if not keep:
            self.pool.release(self.mine.pop())

    @precondition(lambda self: self.mine)
    @rule()
    def a_sequence_ends(self) -> None:
        self.pool.release(self.mine.pop(0))

    @rule(chain=st.sampled_from(CHAINS), count=st.integers(1, 6))
    def begin(self, chain: list[bytes], count: int) -> None:
        held = self.pool.match(chain[:count])
        before = self.pulls.num_pulls
        shared = self.pulls.find(chain[:count])
        if shared is not None:
            assert shared.lacking[0] == chain[len(held)]
            assert shared.state not in (PullState.STOPPING, PullState.ENDED)
        try:
            pull = self.pulls.begin(chain[:count])
        except TooManyPullsError:
            assert before == MAX_PULLS
            return
        if len(held) == count:
            assert pull is None
            return
        assert pull is not None
        assert (list(pull.prefix), list(pull.lacking)) == (held, chain[len(held) : count])
        self.asking.append(pull)

    @precondition(lambda self: self.asking)
    @rule(data=st.data(), good=st.booleans())
    def read(self, data: st.DataObject, good: bool) -> None:
        pull = self.asking.pop(data.draw(st.integers(0, len(self.asking) - 1)))
        count = data.draw(st.integers(1, len(pull.lacking)))
        try:
            blocks = self.pulls.lend(pull, count)
        except OutOfBlocksError:
            self.pulls.stop(pull)
            return
        assert not self.writable() & set(blocks), "two reads share a block"
        assert not {b for table in self.mine for b in table} & set(blocks)
        self.reads[pull] = good

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def bytes_arrive(self, data: st.DataObject) -> None:
        pull = data.draw(st.sampled_from(list(self.reads)))
        block = data.draw(st.sampled_from(pull.blocks))
        self.content[block] = pull.lacking[pull.blocks.index(block)] if self.reads[pull] else b"somebody else's"

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def a_read_ends(self, data: st.DataObject) -> None:
        pull = data.draw(st.sampled_from(list(self.reads)))
        good = self.reads.pop(pull)
        was = pull.state
        for block, hash_ in zip(pull.blocks, pull.lacking, strict=False):
            self.content[block] = hash_ if good else b"somebody else's"
        self.pulls.read_ended(pull)
        if was is PullState.READING:
            self.ended[pull] = good

    @precondition(lambda self: self.ended)
    @rule()
    def the_holder_answers(self) -> None:
        pull, good = self.ended.popitem()
        if pull.state is PullState.ENDED:
            return
        if good:
            prefix = [self.content[block] for block in pull.prefix]
            self.pulls.conclude(pull)
            chain = next(c for c in CHAINS if pull.lacking[0] in c)
            got = chain[: len(prefix) + len(pull.blocks)]
            assert len(self.pool.match(got)) == len(got), "what was pulled is cached behind its prefix"
        else:
            self.pulls.stop(pull)
        assert pull.state is PullState.ENDED

    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """A request is cancelled, or the time is over."""
        going = [*self.asking, *self.reads, *self.ended]
        if not going:
            return
        pull = data.draw(st.sampled_from(going))
        for _ in range(data.draw(st.integers(1, 2))):
            self.pulls.stop(pull)
        if pull in self.asking:
            self.asking.remove(pull)
        assert (pull.state is PullState.STOPPING) == (pull in self.reads)

    @invariant()
    def accounts_add_up(self) -> None:
        self.pool.check_integrity()
        self.pulls.check_integrity()
        self.pulls.check_nothing_else_is_away()
        held = self.pulls.references()
        for table in self.mine:
            for block in table:
                held[block] = held.get(block, 0) + 1
        assert held == self.pool.references()

    @invariant()
    def what_is_cached_is_what_its_hash_says(self) -> None:
        for hash_ in self.pool.hashes():
            (block,) = self.pool.match([hash_])
            assert self.content[block] == hash_

    def teardown(self) -> None:
        for pull in self.asking:
            self.pulls.stop(pull)
        for pull in self.ended:
            self.pulls.stop(pull)
        for pull in self.reads:
            self.pulls.stop(pull)
            self.pulls.read_ended(pull)
        for table in self.mine:
            self.pool.release(table)
        counts = self.pool.counts()
        assert counts.free + counts.cached == NUM_BLOCKS
        assert self.pulls.num_pulls == 0


TestPulls = PullMachine.TestCase
TestPulls.settings = settings(max_examples=150, stateful_step_count=40)


def test_what_was_pulled_is_evicted_before_what_it_stands_on() -> None:
    pool = BlockPool(4)
    pulls = PullBook(pool, max_pulls=1)
    chain = CHAINS[0][:4]
    (first,) = pool.allocate(1)
    pool.remember(first, chain[0])
    pool.release([first])
    pull = pulls.begin(chain)
    assert pull is not None
    pulls.lend(pull, 3)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(1)  # the prefix is kept meanwhile, too
    pulls.read_ended(pull)
    pulls.conclude(pull)
    for left in (3, 2, 1, 0):
        pool.allocate(1)
        assert len(pool.match(chain)) == left


@given(read_ended_s=st.floats(0, 10), lease_ends_s=st.floats(0, 10))
def test_the_holders_word_counts_before_the_lease(read_ended_s: float, lease_ends_s: float) -> None:
    times = {"read_ended_s": read_ended_s, "lease_ends_s": lease_ends_s}
    assert stood(True, **times)
    assert not stood(False, **times)
    assert stood(None, **times) == (read_ended_s < lease_ends_s)
