"""One engine step's metadata, in the terms that paged attention kernels plan with (FlashInfer's, and our torch one's)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from services.engine.sampling_params import Sample, Sampling

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Entry:
    """One sequence's share of a step: compute ``token_ids`` at positions ``start`` onward.  The first ``start`` positions
    of ``block_table`` hold valid KV.  ``sampling`` is None while a prompt has further chunks to come.  The last
    ``num_drafts`` of ``token_ids`` are guesses: with a sampling, a token is drawn for each of their places and one more."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sampling: Sampling | None
    num_drafts: int = 0

    @property
    def drafts(self) -> Sequence[int]:
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def num_samples(self) -> int:
        return 0 if self.sampling is None else self.num_drafts + 1


@dataclass(frozen=True, slots=True)
class Batch:
    """A step over S sequences and T new tokens, sequences back to back.

    token_ids, positions: [T]; ``awaited_token`` stands for one that the step before is still to draw.
    slots: [T], block * block_size + offset where each token's KV is stored.
    qo_indptr: [S + 1], token ranges.  kv_indptr: [S + 1], ranges into kv_indices, the blocks that hold the context
    including the new tokens.  kv_last_page_len: [S], tokens in the last block, 1..block_size.
    kv_spare: [S], the block in the sequence's table behind those, -1 where it has none.
    samples: for each sequence with a sampling, the token behind its last one that is known, and behind each draft.
    """

    token_ids: I64
    positions: I64
    slots: I64
    qo_indptr: I32
    kv_indptr: I32
    kv_indices: I32
    kv_last_page_len: I32
    kv_spare: I32
    samples: tuple[Sample, ...]

    @property
    def num_sequences(self) -> int:
        return len(self.kv_last_page_len)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def awaited_token(sample: int) -> int:
    """Stands in ``token_ids`` for the token that the step before draws as its ``samples[sample]``."""
    return -1 - sample


def build_batch(entries: Sequence[Entry], block_size: int) -> Batch:
    """Pure.  Every entry has at least one token and a block table long enough for its last one."""
    lengths = np.array([len(e.token_ids) for e in entries], dtype=np.int32)
    starts = np.array([e.start for e in entries], dtype=np.int64)
    ends = (starts + lengths).astype(np.int32)
    num_blocks = -(-ends // block_size)
    qo_indptr, kv_indptr = _indptr(lengths), _indptr(num_blocks)
    tables = [e.block_table[:n] for e, n in zip(entries, num_blocks.tolist(), strict=True)]
    kv_indices = np.array(list(chain.from_iterable(tables)), dtype=np.int32)
    # One array over all sequences, for a step of many waits for this.
    positions = np.repeat(starts - qo_indptr[:-1], lengths) + np.arange(qo_indptr[-1])
    blocks = kv_indices[np.repeat(kv_indptr[:-1], lengths) + positions // block_size]
    return Batch(
        token_ids=np.array(list(chain.from_iterable(e.token_ids for e in entries)), dtype=np.int64),
        positions=positions,
        slots=blocks.astype(np.int64) * block_size + positions % block_size,
        qo_indptr=qo_indptr,
        kv_indptr=kv_indptr,
        kv_indices=kv_indices,
        kv_last_page_len=((ends - 1) % block_size + 1).astype(np.int32),
        kv_spare=np.array(
            [
                e.block_table[n] if len(e.block_table) > n else -1
                for e, n in zip(entries, num_blocks.tolist(), strict=True)
            ],
            dtype=np.int32,
        ),
        samples=tuple(s for e, end in zip(entries, qo_indptr[1:].tolist(), strict=True) for s in _samples(e, end)),
    )


def following(batch: Batch, block_size: int) -> Batch | None:
    """The step in which each sequence computes the token that is drawn for it in ``batch``, as far as it is known before
    that: token_ids are 0 and samples not named.  Pure.  None unless every sequence decodes, one token without drafts, and
    has the block that its next one needs."""
    if not batch.num_sequences == batch.num_tokens == len(batch.samples):
        return None
    is_full = batch.kv_last_page_len == block_size
    if (batch.kv_spare[is_full] < 0).any():
        return None
    more = _indptr(is_full.astype(np.int32))
    return Batch(
        token_ids=np.zeros_like(batch.token_ids),
        positions=batch.positions + 1,
        slots=np.where(is_full, batch.kv_spare.astype(np.int64) * block_size, batch.slots + 1),
        qo_indptr=batch.qo_indptr,
        kv_indptr=batch.kv_indptr + more,
        kv_indices=np.insert(batch.kv_indices, batch.kv_indptr[1:][is_full], batch.kv_spare[is_full]),
        kv_last_page_len=np.where(is_full, 1, batch.kv_last_page_len + 1).astype(np.int32),
        kv_spare=np.where(is_full, -1, batch.kv_spare).astype(np.int32),
        samples=(),
    )


def same_places(one: Batch, other: Batch) -> bool:
    """Whether the two compute tokens at the same places of the same blocks, whatever the tokens."""
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("positions", "qo_indptr", "kv_indptr", "kv_indices")
    )


def _samples(entry: Entry, end_row: int) -> Iterator[Sample]:
    if entry.sampling is None:
        return
    end = entry.start + len(entry.token_ids)
    for behind, draft in zip(range(entry.num_drafts, -1, -1), (*entry.drafts, None), strict=True):
        yield Sample(end_row - 1 - behind, entry.sampling, end - behind, draft)


def _indptr(lengths: I32) -> I32:
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
