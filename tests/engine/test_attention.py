from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.attention.torch_attention import TorchAttention
from services.engine.batch import Entry, build_batch

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_LAYERS = 6, 2, 8, 3


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, window: int | None) -> torch.Tensor:
    """One sequence, one query, one head at a time.  key, value: [tokens, kv_heads, dim] of the whole sequence."""
    attended = torch.zeros_like(query)
    for row in range(len(query)):
        position = start + row
        begin = 0 if window is None else max(0, position - window + 1)
        for head in range(NUM_HEADS):
            kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
            scores = key[begin : position + 1, kv_head] @ query[row, head] / math.sqrt(HEAD_DIM)
            attended[row, head] = scores.softmax(0) @ value[begin : position + 1, kv_head]
    return attended


@settings(max_examples=60)
@given(
    shape=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 1, 2, 5, 19])), min_size=1, max_size=6),
    window=st.sampled_from([None, 1, 4, 16, 1000]),
    block_size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 1000),
)
def test_any_batch_equals_the_naive_sum(shape: list[tuple[int, int]], window: int | None, block_size: int,
                                        seed: int) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    lengths = [start + num_new for start, num_new in shape]
    num_blocks = sum(-(-length // block_size) for length in lengths) + 3
    blocks = random.permutation(num_blocks).tolist()
    # The other layers and every slot that holds no token are NaN: none of it may be read.
    arena = torch.full((num_blocks, NUM_LAYERS, 2, block_size, NUM_KV_HEADS, HEAD_DIM), math.nan)
    entries, sequences = [], []
    for (start, num_new), length in zip(shape, lengths, strict=True):
        table = [blocks.pop() for _ in range(-(-length // block_size))]
        kv = torch.randn(2, length, NUM_KV_HEADS, HEAD_DIM)
        for position in range(length):
            arena[table[position // block_size], 1, :, position % block_size] = kv[:, position]
        entries.append(Entry([0] * num_new, start, table, None))
        sequences.append(kv)
    batch = build_batch(entries, block_size)
    query = torch.randn(batch.num_tokens, NUM_HEADS, HEAD_DIM)
    attention = TorchAttention(block_size=block_size, sliding_window=window)
    found = attention.plan(batch).run(query, arena[:, 1])
    for number, ((start, _), kv) in enumerate(zip(shape, sequences, strict=True)):
        rows = slice(int(batch.qo_indptr[number]), int(batch.qo_indptr[number + 1]))
        assert torch.allclose(found[rows], naive(query[rows], kv[0], kv[1], start, window), atol=1e-5)


def test_blocks_outside_the_window_are_not_read() -> None:
    arena = torch.full((8, 1, 2, 4, NUM_KV_HEADS, HEAD_DIM), math.nan)
    arena[4:] = 1.0
    batch = build_batch([Entry([0], 31, list(range(8)), None)], 4)
    plan = TorchAttention(block_size=4, sliding_window=16).plan(batch)
    assert plan.run(torch.randn(1, NUM_HEADS, HEAD_DIM), arena[:, 0]).isfinite().all()


def test_decodes_of_very_unequal_length_are_not_padded_to_the_longest() -> None:
    entries = [Entry([0], 500, list(range(126)), None), *(Entry([0], 7, [200 + n, 300 + n], None) for n in range(5))]
    plan = TorchAttention(block_size=4, sliding_window=None).plan(build_batch(entries, 4))
    assert sorted(len(group.rows) for group in plan.decodes) == [1, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_type_of_the_queries(dtype: torch.dtype) -> None:
    arena = torch.ones((4, 1, 2, 4, NUM_KV_HEADS, HEAD_DIM), dtype=dtype)
    batch = build_batch([Entry([0, 0], 0, [2], None), Entry([0], 5, [1, 3], None)], 4)
    found = (
        TorchAttention(block_size=4, sliding_window=None)
        .plan(batch)
        .run(torch.randn(3, NUM_HEADS, HEAD_DIM, dtype=dtype), arena[:, 0])
    )
    assert found.dtype == dtype
    assert torch.allclose(found, torch.ones_like(found), atol=1e-2)
