"""Batch sizes that decoding is prepared for, and how a batch is made one of them.  Pure: numpy only."""

from __future__ import annotations

import numpy as np

from services.engine.batch import Batch

_STEP = 8


def bucket_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4 and then multiples of 8, up to the first that holds ``most`` sequences."""
    small = tuple(size for size in (1, 2, 4) if size < most)
    return small + tuple(range(_STEP, most + _STEP, _STEP)) if most > 4 else (*small, most)


def bucket_for(batch: Batch, sizes: tuple[int, ...]) -> int | None:
    """The smallest of ``sizes``, which ascend, that holds a batch of single tokens; None for any other batch, and for one
    that is too large."""
    if batch.num_tokens != batch.num_sequences:
        return None
    return next((size for size in sizes if size >= batch.num_sequences), None)


def pad(batch: Batch, size: int) -> Batch:
    """``size`` sequences: those of ``batch``, of one token each, and then the shortest of them over and over.

    A copy computes the same number for the same slot that its original writes, so it needs no place of its own, and nobody
    draws from it."""
    num_copies = size - batch.num_sequences
    if num_copies == 0:
        return batch
    num_blocks = np.diff(batch.kv_indptr)
    copied = int(num_blocks.argmin())
    sources = np.concatenate([np.arange(batch.num_sequences), np.full(num_copies, copied)])
    blocks = batch.kv_indices[batch.kv_indptr[copied] : batch.kv_indptr[copied + 1]]
    return Batch(
        token_ids=batch.token_ids[sources],
        positions=batch.positions[sources],
        slots=batch.slots[sources],
        qo_indptr=np.arange(size + 1, dtype=np.int32),
        kv_indptr=np.concatenate([np.zeros(1, np.int32), np.cumsum(num_blocks[sources], dtype=np.int32)]),
        kv_indices=np.concatenate([batch.kv_indices, np.tile(blocks, num_copies)]),
        kv_last_page_len=batch.kv_last_page_len[sources],
        kv_spare=batch.kv_spare[sources],
        samples=batch.samples,
    )
