"""Pins against every order of readers, evictions and clock: no pinned block is evicted, every reference comes back."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.engine.blocks import BlockPool, OutOfBlocksError
from services.worker.pins import Pin, PinBook, PinRefusedError, ReaderId, TooManyPinsError

READER = ReaderId("prefill-0", 7)
NUM_BLOCKS = 10
MAX_BLOCKS = 4
MAX_PINS = 3


def book(num_blocks: int = NUM_BLOCKS, max_blocks: int = MAX_BLOCKS) -> tuple[BlockPool, PinBook]:
    pool = BlockPool(num_blocks)
    return pool, PinBook(pool, max_blocks=max_blocks, max_pins=MAX_PINS)


def cache(pool: BlockPool, *hashes: bytes) -> list[int]:
    """Blocks that nobody holds, known by ``hashes``."""
    blocks = pool.allocate(len(hashes))
    for block, h in zip(blocks, hashes, strict=True):
        pool.remember(block, h)
    pool.release(blocks)
    return blocks


def pin(pins: PinBook, *hashes: bytes, reader: ReaderId = READER, now_s: float = 0.0, name: str = "p") -> Pin | None:
    return pins.pin(name, hashes, reader, now_s=now_s, lifetime_s=10.0)


class PinMachine(RuleBasedStateMachine):
    """Keeps its own account: ``standing`` pins with what their blocks held when they were pinned, and ``mine``, blocks
    that sequences hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.pins = book()
        self.now_s = 0.0
        self.count = 0
        self.content: list[bytes] = [b""] * NUM_BLOCKS
        self.chains: list[list[bytes]] = []
        self.mine: list[list[int]] = []
        self.standing: dict[str, tuple[Pin, list[bytes]]] = {}
        self.ended: list[Pin] = []
        self.incarnations = {"a": 1, "b": 1}

    def end(self, *pins: Pin) -> None:
        for p in pins:
            del self.standing[p.id]
            self.ended.append(p)

    def end_late(self) -> None:
        self.end(*[p for p, _ in self.standing.values() if self.now_s >= p.expires_s])

    @rule(count=st.integers(1, 5), keep=st.booleans())
    def compute(self, count: int, keep: bool) -> None:
        """A sequence takes blocks, evicting what it needs, and writes new content into them."""
        try:
            blocks = self.pool.allocate(count)
        except OutOfBlocksError:
            return
        pinned = {b for p, _ in self.standing.values() for b in p.blocks}
        assert not pinned & set(blocks), "a pinned block was handed out"
        chain = []
        for block in blocks:
            self.count += 1
            self.content[block] = b"%d" % self.count
            self.pool.remember(block, self.content[block])
            chain.append(self.content[block])
        self.chains.append(chain)
        self.mine.append(blocks)
        if not keep:
            self.pool.release(self.mine.pop())

    @rule(count=st.integers(1, 3))
    def lend(self, count: int) -> None:
        """A writer's blocks, written and given back."""
        if count <= self.pool.num_available:
            blocks = self.pool.lend(count)
            pinned = {b for p, _ in self.standing.values() for b in p.blocks}
            assert not pinned & set(blocks), "a pinned block was lent"
            for block in blocks:
                self.content[block] = b"of a writer"
            self.pool.quarantine(blocks)
            self.pool.restore(blocks)

    @precondition(lambda self: self.mine)
    @rule()
    def a_sequence_ends(self) -> None:
        self.pool.release(self.mine.pop(0))

    @precondition(lambda self: self.chains)
    @rule(data=st.data(), reader=st.sampled_from("ab"), lifetime_s=st.floats(0.5, 9))
    def pin(self, data: st.DataObject, reader: str, lifetime_s: float) -> None:
        chain = data.draw(st.sampled_from(self.chains))
        held = self.pool.match(chain)[:MAX_BLOCKS]
        self.count += 1
        try:
            given = self.pins.pin(
                str(self.count), chain, ReaderId(reader, self.incarnations[reader]),
                now_s=self.now_s, lifetime_s=lifetime_s,
            )  # fmt: skip
        except TooManyPinsError:
            self.end_replaced_and_late(reader)
            pinned = {b for p, _ in self.standing.values() for b in p.blocks}
            assert len(self.standing) == MAX_PINS or len(pinned | set(held)) > MAX_BLOCKS
            return
        self.end_replaced_and_late(reader)
        if given is None:
            assert not held
            return
        assert list(given.blocks) == held
        assert [self.content[b] for b in held] == chain[: len(held)]
        self.standing[given.id] = (given, chain[: len(held)])

    def end_replaced_and_late(self, reader: str) -> None:
        self.end_late()
        newest = ReaderId(reader, self.incarnations[reader])
        self.end(*[p for p, _ in self.standing.values() if p.reader.worker_id == reader and p.reader != newest])

    @precondition(lambda self: self.chains)
    @rule(reader=st.sampled_from("ab"))
    def a_replaced_reader_speaks(self, reader: str) -> None:
        newest = ReaderId(reader, self.incarnations[reader])
        old = ReaderId(reader, newest.incarnation - 1)
        if any(p.reader == newest and self.now_s < p.expires_s for p, _ in self.standing.values()):
            with pytest.raises(PinRefusedError):
                self.pins.pin("late", self.chains[0], old, now_s=self.now_s, lifetime_s=1.0)
            self.end_late()

    @precondition(lambda self: self.standing or self.ended)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Also again, and after the end."""
        self.end_late()
        every = [p for p, _ in self.standing.values()] + self.ended
        chosen = data.draw(st.sampled_from(every))
        stood = chosen.id in self.standing
        assert self.pins.release(chosen.id, chosen.reader, now_s=self.now_s) is stood
        if stood:
            self.end(chosen)

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def expire(self) -> None:
        late = {p.id for p, _ in self.standing.values() if self.now_s >= p.expires_s}
        assert {p.id for p in self.pins.expire(self.now_s)} == late
        self.end_late()

    @rule(reader=st.sampled_from("ab"))
    def a_reader_restarts(self, reader: str) -> None:
        self.incarnations[reader] += 1

    @invariant()
    def pinned_blocks_keep_their_content(self) -> None:
        for p, content in self.standing.values():
            assert [self.content[b] for b in p.blocks] == content

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity()
        self.pins.check_integrity()
        held = self.pins.references()
        for group in self.mine:
            for block in group:
                held[block] = held.get(block, 0) + 1
        assert held == self.pool.references()

    def teardown(self) -> None:
        """Whoever died, the leases end, and every reference has come back."""
        self.pins.expire(self.now_s + 10)
        for group in self.mine:
            self.pool.release(group)
        assert (self.pins.num_pins, self.pins.num_blocks, self.pool.counts().active) == (0, 0, 0)


TestPins = PinMachine.TestCase
TestPins.settings = settings(max_examples=80, stateful_step_count=40)


def test_the_longest_prefix_held_is_pinned() -> None:
    pool, pins = book()
    a, b, _ = cache(pool, b"a", b"b", b"d")
    given = pin(pins, b"a", b"b", b"c", b"d")
    assert given is not None
    assert given.blocks == (a, b)
    assert pin(pins, b"c", name="q") is None
    assert pins.num_pins == 1


def test_a_pinned_block_stays_however_tight_the_pool() -> None:
    pool, pins = book(4)
    cache(pool, b"a", b"b")
    pin(pins, b"a", b"b")
    pool.allocate(2)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(1)
    assert pins.release("p", READER, now_s=1.0)
    assert len(pool.allocate(2)) == 2


def test_a_pin_ends_with_its_lease_and_not_before() -> None:
    pool, pins = book()
    cache(pool, b"a")
    given = pin(pins, b"a")
    assert pins.next_expiry_s() == 10.0
    assert pins.expire(9.999) == []
    assert pins.expire(10.0) == [given]
    assert not pins.release("p", READER, now_s=10.0)
    assert pins.next_expiry_s() is None


def test_a_release_that_comes_late_is_told_so() -> None:
    """The lease was over, though nobody had looked yet."""
    pool, pins = book()
    cache(pool, b"a")
    pin(pins, b"a")
    assert not pins.release("p", READER, now_s=10.0)
    assert pool.counts().active == 0


def test_releasing_an_ended_pin_leaves_a_later_one_of_the_same_blocks() -> None:
    pool, pins = book()
    cache(pool, b"a")
    pin(pins, b"a", name="first")
    assert pins.release("first", READER, now_s=1.0)
    pin(pins, b"a", name="second", now_s=2.0)
    assert not pins.release("first", READER, now_s=3.0)
    assert pins.num_pins == pool.counts().active == 1


@pytest.mark.parametrize("reader", [ReaderId("prefill-0", 8), ReaderId("prefill-0", 6), ReaderId("prefill-1", 7)])
def test_a_pin_is_released_by_its_reader_only(reader: ReaderId) -> None:
    pool, pins = book()
    cache(pool, b"a")
    pin(pins, b"a")
    with pytest.raises(PinRefusedError, match="prefill-0/7's"):
        pins.release("p", reader, now_s=1.0)
    assert pins.release("p", READER, now_s=1.0)


def test_a_newer_process_of_the_reader_ends_its_predecessors_pins_at_once() -> None:
    pool, pins = book()
    cache(pool, b"a")
    pin(pins, b"a")
    pin(pins, b"a", reader=ReaderId("prefill-1", 7), name="another's")
    assert pin(pins, b"nothing held", reader=ReaderId("prefill-0", 8), name="q") is None
    assert not pins.release("p", READER, now_s=1.0)
    assert pins.num_pins == 1, "the other reader's stands"


def test_pins_take_no_more_than_their_share() -> None:
    pool, pins = book()
    cache(pool, *(b"%d" % i for i in range(6)))
    cache(pool, b"x")
    given = pin(pins, *(b"%d" % i for i in range(6)), name="long")
    assert given is not None
    assert len(given.blocks) == MAX_BLOCKS
    assert pin(pins, b"0", b"1", name="same blocks") is not None
    before = pool.counts()
    with pytest.raises(TooManyPinsError, match="1 more blocks asked for, 4 of the 4"):
        pin(pins, b"x", name="more")
    assert pool.counts() == before
    pin(pins, b"0", name="third")
    with pytest.raises(TooManyPinsError, match="3 pins stand already"):
        pin(pins, b"0", name="fourth")
    assert pin(pins, b"x", name="later", now_s=10.0) is not None, "the leases were over"


def test_a_pool_too_small_to_share_pins_nothing() -> None:
    pool, pins = book(2, max_blocks=0)
    cache(pool, b"a")
    assert pin(pins, b"a") is None
