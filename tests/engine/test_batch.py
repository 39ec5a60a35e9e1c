from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.engine.batch import Entry, build_batch
from services.engine.sampling_params import Sample, Sampling


@st.composite
def entries(draw: st.DrawFn) -> tuple[int, list[Entry]]:
    block_size = draw(st.integers(1, 8))
    made = []
    for number in range(draw(st.integers(1, 5))):
        start, length = draw(st.integers(0, 30)), draw(st.integers(1, 30))
        num_blocks = -(-(start + length) // block_size) + draw(st.integers(0, 3))
        table = draw(st.lists(st.integers(0, 999), min_size=num_blocks, max_size=num_blocks))
        tokens = draw(st.lists(st.integers(0, 49151), min_size=length, max_size=length))
        sampling = draw(st.sampled_from([None, Sampling(seed=number)]))
        num_drafts = draw(st.integers(0, length - 1)) if sampling else 0
        made.append(Entry(tokens, start, table, sampling, num_drafts))
    return block_size, made


@given(case=entries())
def test_a_batch_says_what_its_entries_say(case: tuple[int, list[Entry]]) -> None:
    block_size, made = case
    batch = build_batch(made, block_size)
    token_ids, positions, slots, qo_indptr, kv_indptr, kv_indices, last, samples = [], [], [], [0], [0], [], [], []
    for entry in made:
        for offset, token in enumerate(entry.token_ids):
            position = entry.start + offset
            token_ids.append(token)
            positions.append(position)
            slots.append(entry.block_table[position // block_size] * block_size + position % block_size)
        end, used = entry.start + len(entry.token_ids), 0
        while used * block_size < end:
            kv_indices.append(entry.block_table[used])
            used += 1
        last.append(end - (used - 1) * block_size)
        qo_indptr.append(len(token_ids))
        kv_indptr.append(len(kv_indices))
        if entry.sampling is not None:
            known = len(entry.token_ids) - entry.num_drafts
            row, position = qo_indptr[-2] + known - 1, entry.start + known
            for draft in entry.token_ids[known:]:
                samples.append(Sample(row, entry.sampling, position, draft))
                row, position = row + 1, position + 1
            samples.append(Sample(row, entry.sampling, position, None))
    assert batch.token_ids.tolist() == token_ids
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert batch.qo_indptr.tolist() == qo_indptr
    assert batch.kv_indptr.tolist() == kv_indptr
    assert batch.kv_indices.tolist() == kv_indices
    assert batch.kv_last_page_len.tolist() == last
    assert list(batch.samples) == samples
    assert (batch.num_sequences, batch.num_tokens) == (len(made), len(token_ids))
    assert {batch.qo_indptr.dtype, batch.kv_indptr.dtype, batch.kv_indices.dtype} == {np.dtype("int32")}
    assert {batch.token_ids.dtype, batch.positions.dtype, batch.slots.dtype} == {np.dtype("int64")}
