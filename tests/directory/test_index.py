from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.api.directory.v1 import directory_pb2
from services.directory import index as index_module
from services.directory.index import BlockIndex, Prefix, num_hashes
from services.runtime.tier import Tier

Held = dict[int, set[Tier]]


# With it as their second half, all hashes mix to the same, whatever the seed.
COLLIDING = 0x9E3779B97F4A7C15


def block(n: int) -> bytes:
    return n.to_bytes(8, "little") + (COLLIDING if n % 2 and n < 40 else 0).to_bytes(8, "little")


def blocks(numbers: Iterable[int]) -> bytes:
    return b"".join(map(block, numbers))


def held_by(index: BlockIndex, worker: str, tier: Tier) -> list[int]:
    data = b"".join(index.held_by(worker, tier, 3))
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 16)]


@dataclass
class Naive:
    """What the index is to say, by the simplest means."""

    max_entries: int
    held: dict[str, Held] = field(default_factory=dict)
    num_left_out: int = 0

    @property
    def num_entries(self) -> int:
        return sum(map(len, self.held.values()))

    def stored(self, worker: str, numbers: list[int], tier: Tier) -> None:
        held = self.held.setdefault(worker, {})
        for number in numbers:
            if number in held:
                held[number].add(tier)
            elif self.num_entries < self.max_entries:
                held[number] = {tier}
            else:
                self.num_left_out += 1

    def removed(self, worker: str, numbers: list[int], tier: Tier) -> None:
        held = self.held.get(worker, {})
        for number in numbers:
            if number in held:
                held[number].discard(tier)
                if not held[number]:
                    del held[number]

    def longest_prefix(self, chain: list[int]) -> dict[str, Prefix]:
        found = {}
        for worker, held in self.held.items():
            length = 0
            while length < len(chain) and chain[length] in held:
                length += 1
            if length:
                found[worker] = Prefix(length, sum(Tier.DEVICE in held[n] for n in chain[:length]))
        return found


def assert_equal(index: BlockIndex, naive: Naive, chains: Iterable[list[int]]) -> None:
    index.check_integrity()
    for worker, held in naive.held.items():
        assert index.num_blocks(worker) == len(held)
        for tier in Tier:
            assert sorted(held_by(index, worker, tier)) == sorted(n for n, tiers in held.items() if tier in tiers)
    assert index.num_blocks_by_worker() == {worker: len(held) for worker, held in naive.held.items() if held}
    assert index.num_left_out == naive.num_left_out
    for chain in chains:
        assert index.longest_prefix(blocks(chain)) == naive.longest_prefix(chain)


NUMBERS = st.lists(st.integers(0, 40), max_size=25)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["stored", "stored", "removed", "cleared"]),
        st.sampled_from(["w1", "w2", "w3"]),
        NUMBERS,
        st.sampled_from(Tier),
    ),
    max_size=30,
)


# One table of at first 8 slots: most blocks collide, and it grows and shrinks.
@given(OPERATIONS, st.lists(NUMBERS, max_size=4), st.sampled_from([0, 10]), st.sampled_from([7, 1000]))
def test_index_equals_the_naive_one(
    operations: list[tuple[str, str, list[int], Tier]], chains: list[list[int]], table_bits: int, max_entries: int
) -> None:
    index, naive = BlockIndex(max_entries=max_entries, table_bits=table_bits), Naive(max_entries)
    for kind, worker, numbers, tier in operations:
        if kind == "stored":
            index.stored(worker, blocks(numbers), tier)
            naive.stored(worker, numbers, tier)
        elif kind == "removed":
            index.removed(worker, blocks(numbers), tier)
            naive.removed(worker, numbers, tier)
        else:
            index.cleared(worker)
            naive.held.pop(worker, None)
        assert_equal(index, naive, [*chains, numbers])
        assert index.num_entries == naive.num_entries


@given(OPERATIONS, st.lists(NUMBERS, max_size=4), st.integers(1, 5))
def test_it_is_right_while_cleared_blocks_are_yet_to_be_dropped(
    operations: list[tuple[str, str, list[int], Tier]], chains: list[list[int]], max_hashes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_MAX_HASHES", max_hashes)
        index, naive = BlockIndex(table_bits=0), Naive(1000)
        for kind, worker, numbers, tier in operations:
            if kind == "cleared":
                index.cleared(worker)
                naive.held.pop(worker, None)
            else:
                getattr(index, kind)(worker, blocks(numbers), tier)
                getattr(naive, kind)(worker, numbers, tier)
            assert_equal(index, naive, [*chains, numbers])
            assert index.num_entries >= naive.num_entries
        # Each change drops two blocks for one of its own.
        index.removed("nobody", blocks(range(index.num_entries)))
        assert index.num_entries == naive.num_entries


@given(st.integers(0, 2**32))
def test_it_holds_more_workers_than_one_group(seed: int) -> None:
    rng = random.Random(seed)
    index, naive = BlockIndex(), Naive(10**6)
    for _ in range(300):
        worker, numbers = f"w{rng.randrange(150)}", rng.sample(range(30), 12)
        if rng.random() < 0.2:
            index.cleared(worker)
            naive.held.pop(worker, None)
        else:
            kind, tier = rng.choice(["stored", "stored", "removed"]), rng.choice(list(Tier))
            getattr(index, kind)(worker, blocks(numbers), tier)
            getattr(naive, kind)(worker, numbers, tier)
    assert_equal(index, naive, [rng.sample(range(30), 5) for _ in range(50)])


def test_numbers_of_workers_that_left_are_taken_again() -> None:
    index = BlockIndex()
    for n in range(1000):
        index.stored(f"w{n}", block(n))
        (index.cleared if n % 2 else lambda worker, n=n: index.removed(worker, block(n)))(f"w{n}")
    assert len(index._groups) == 1
    index.check_integrity()


def test_a_prefix_counts_what_is_on_the_device() -> None:
    index = BlockIndex()
    index.stored("w", blocks(range(6)))
    index.stored("w", blocks([1, 2]), Tier.HOST)
    index.removed("w", blocks([2, 3]), Tier.DEVICE)
    assert index.longest_prefix(blocks(range(6))) == {"w": Prefix(3, 2)}
    index.stored("w", block(3), Tier.HOST)
    assert index.longest_prefix(blocks(range(6))) == {"w": Prefix(6, 4)}
    index.removed("w", block(0), Tier.HOST)
    assert index.longest_prefix(blocks(range(6))) == {"w": Prefix(6, 4)}


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 31, 32, 33, 63, 64, 100, 1000])
def test_a_chain_of_any_length_is_followed_to_its_end(num_blocks: int) -> None:
    index = BlockIndex()
    chain = blocks(range(num_blocks))
    index.stored("all", chain)
    index.stored("less", chain[: num_blocks // 2 * 16])
    index.stored("host", chain, Tier.HOST)
    expected = {"all": (num_blocks, num_blocks), "less": (num_blocks // 2,) * 2, "host": (num_blocks, 0)}
    assert index.longest_prefix(chain) == {worker: Prefix(*ends) for worker, ends in expected.items() if ends[0]}
    assert index.longest_prefix(chain + block(10**9)) == index.longest_prefix(chain)


def test_memory_comes_and_goes_with_the_blocks() -> None:
    index = BlockIndex()
    index.stored("w", block(0))
    small = index.nbytes
    for start in range(0, 1 << 20, 1 << 12):
        index.stored(f"w{start % 5}", blocks(range(start, start + (1 << 12))))
        if start > 1 << 17:
            assert index.nbytes / index.num_entries < 80
    index.check_integrity()
    for start in range(0, 1 << 20, 1 << 12):
        index.removed(f"w{start % 5}", blocks(range(start, start + (1 << 12))))
    index.stored("w", block(0))
    assert index.nbytes < small + 1024
    index.check_integrity()


def test_a_large_cache_is_gone_at_once_and_dropped_by_and_by() -> None:
    index = BlockIndex(max_entries=50_000)
    index.stored("large", blocks(range(50_000)))
    index.cleared("large")
    assert index.longest_prefix(block(0)) == index.longest_prefix(block(49_999)) == {}
    assert index.num_blocks("large") == 0
    assert index.num_entries > 40_000, "the caller waited until all was dropped"
    # Whoever takes its place finds room as fast as it comes.
    for start in range(0, 50_000, 1_000):
        index.stored("large", blocks(range(start, start + 1_000)))
        index.check_integrity()
    assert (index.num_entries, index.num_left_out) == (50_000, 0)


def test_what_does_not_fit_is_left_out_and_counted() -> None:
    index = BlockIndex(max_entries=3)
    index.stored("a", blocks([1, 2]))
    index.stored("b", blocks([1, 2]))
    assert (index.num_entries, index.num_left_out) == (3, 1)
    assert index.longest_prefix(blocks([1, 2])) == {"a": Prefix(2, 2), "b": Prefix(1, 1)}
    index.stored("a", blocks([1, 2]), Tier.HOST)
    assert index.num_left_out == 1, "another tier of a block that is held needs no room"
    index.stored("c", block(1))
    assert index.num_left_out == 2
    index.cleared("a")
    index.stored("c", blocks([1, 2]))
    assert index.longest_prefix(blocks([1, 2])) == {"b": Prefix(1, 1), "c": Prefix(2, 2)}
    index.check_integrity()


def test_integrity_notices_a_difference() -> None:
    index = BlockIndex()
    index.stored("w", block(1))
    index._groups[0].store(63, Tier.DEVICE, block(1), room=1)
    with pytest.raises(AssertionError, match="1 entries are counted and 2 held"):
        index.check_integrity()


@pytest.mark.parametrize("nbytes", [1, 15, 17])
def test_a_broken_hash_is_refused(nbytes: int) -> None:
    index = BlockIndex()
    for call in (num_hashes, index.longest_prefix, lambda data: index.stored("w", data)):
        with pytest.raises(ValueError, match="16 bytes"):
            call(b"x" * nbytes)
    assert index.num_blocks_by_worker() == {}


def test_tiers_are_numbered_as_in_the_protocol() -> None:
    names = {f"TIER_{tier.name}": tier.value for tier in Tier}
    assert {"TIER_UNSPECIFIED": 0} | names == dict(directory_pb2.Tier.items())
    assert [Tier.of(n) for n in range(4)] == [Tier.DEVICE, Tier.DEVICE, Tier.HOST, None]
