from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.engine.batch import Entry, build_batch, following, same_places
from services.engine.buckets import bucket_for, bucket_sizes, pad
from services.engine.sampling_params import Sampling


def decodes(lengths: list[int], block_size: int, spare: int = 0) -> list[Entry]:
    entries, first = [], 0
    for length in lengths:
        num_blocks = -(-(length + 1) // block_size) + spare
        entries.append(Entry([7], length, list(range(first, first + num_blocks)), Sampling()))
        first += num_blocks
    return entries


def test_sizes_ascend_and_hold_the_most() -> None:
    for most in range(1, 300):
        sizes = bucket_sizes(most)
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] >= most
        assert sizes[-1] < most + 8
    assert bucket_sizes(20) == (1, 2, 4, 8, 16, 24)


@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=9), block_size=st.sampled_from([4, 16]))
def test_a_padded_batch_is_the_batch_and_copies_of_its_shortest(lengths: list[int], block_size: int) -> None:
    batch = build_batch(decodes(lengths, block_size), block_size)
    size = bucket_for(batch, bucket_sizes(16))
    assert size is not None
    padded = pad(batch, size)
    n = len(lengths)
    assert padded.num_sequences == padded.num_tokens == size
    assert padded.samples == batch.samples
    for name in ("token_ids", "positions", "slots", "kv_last_page_len"):
        assert getattr(padded, name)[:n].tolist() == getattr(batch, name).tolist()
    blocks = [padded.kv_indices[a:b].tolist() for a, b in zip(padded.kv_indptr, padded.kv_indptr[1:], strict=False)]
    assert np.concatenate(blocks[:n]).tolist() == batch.kv_indices.tolist()
    for copy in range(n, size):
        (original,) = [i for i in range(n) if padded.slots[i] == padded.slots[copy]]
        assert blocks[copy] == blocks[original]
        assert padded.positions[copy] == padded.positions[original]
        assert padded.kv_last_page_len[copy] == padded.kv_last_page_len[original]
        assert len(blocks[copy]) == min(map(len, blocks))
    assert padded.qo_indptr.tolist() == list(range(size + 1))
    assert {padded.kv_indptr.dtype, padded.kv_indices.dtype, padded.qo_indptr.dtype} == {np.dtype("int32")}


def test_no_bucket_holds_chunks_or_too_many() -> None:
    sizes = (1, 2, 4)
    assert bucket_for(build_batch([Entry([1, 2], 0, [0], None)], 4), sizes) is None
    assert bucket_for(build_batch(decodes([3] * 5, 4), 4), sizes) is None
    assert bucket_for(build_batch(decodes([3] * 3, 4), 4), sizes) == 4


@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6), block_size=st.sampled_from([1, 4, 16]))
def test_the_step_that_follows_is_the_one_that_comes(lengths: list[int], block_size: int) -> None:
    now = decodes(lengths, block_size, spare=1)
    expected = build_batch([Entry([9], e.start + 1, e.block_table, Sampling()) for e in now], block_size)
    found = following(build_batch(now, block_size), block_size)
    assert found is not None
    assert same_places(found, expected)
    assert found.slots.tolist() == expected.slots.tolist()
    assert found.kv_last_page_len.tolist() == expected.kv_last_page_len.tolist()


def test_what_follows_is_not_foreseen_without_a_block_a_draw_or_with_drafts() -> None:
    full = build_batch(decodes([3], 4), 4)
    assert full.kv_spare.tolist() == [-1]
    assert following(full, 4) is None
    assert following(build_batch([Entry([1], 1, [0], None)], 4), 4) is None
    assert following(build_batch([Entry([1, 2], 1, [0], Sampling(), 1)], 4), 4) is None
