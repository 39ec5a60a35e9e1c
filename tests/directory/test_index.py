from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.directory.index import BlockIndex, split_hashes


def block(n: int) -> bytes:
    return n.to_bytes(16, "big")


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["stored", "removed", "cleared"]),
        st.sampled_from(["w1", "w2", "w3"]),
        st.lists(st.integers(0, 7).map(block), max_size=5),
    ),
    max_size=30,
)


@given(OPERATIONS, st.lists(st.integers(0, 7).map(block), max_size=6, unique=True))
def test_index_equals_the_naive_one(operations: list[tuple[str, str, list[bytes]]], chain: list[bytes]) -> None:
    index = BlockIndex()
    naive: dict[str, set[bytes]] = {"w1": set(), "w2": set(), "w3": set()}
    for kind, worker, hashes in operations:
        if kind == "stored":
            index.stored(worker, hashes)
            naive[worker] |= set(hashes)
        elif kind == "removed":
            index.removed(worker, hashes)
            naive[worker] -= set(hashes)
        else:
            index.cleared(worker)
            naive[worker] = set()
        index.check_integrity()
    expected = {}
    for worker, held in naive.items():
        assert index.num_blocks(worker) == len(held)
        assert index.held_by(worker) == held
        length = 0
        while length < len(chain) and chain[length] in held:
            length += 1
        if length:
            expected[worker] = length
    assert index.longest_prefix(chain) == expected
    assert index.num_distinct_blocks == len(set().union(*naive.values()))
    assert index.num_blocks_by_worker() == {worker: len(held) for worker, held in naive.items() if held}


def test_integrity_notices_a_difference() -> None:
    index = BlockIndex()
    index.stored("w", [block(1)])
    index._holders[block(1)].add("other")
    with pytest.raises(AssertionError, match="one side only"):
        index.check_integrity()


@given(st.lists(st.binary(min_size=16, max_size=16)))
def test_hashes_are_split_as_joined(hashes: list[bytes]) -> None:
    assert split_hashes(b"".join(hashes)) == hashes


@pytest.mark.parametrize("nbytes", [1, 15, 17])
def test_a_broken_hash_is_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        split_hashes(b"x" * nbytes)
