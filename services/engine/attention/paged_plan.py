"""What paged attention kernels are told of a step, made from its ``Batch``.  Pure: numpy only.

Names and shapes are FlashInfer's: ``indptr`` are ranges, ``indices`` pages, a page is a KV block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.engine.batch import I32, Batch


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Sequences that one kernel computes, and the tokens of the batch that are theirs: rows [begin, end).

    qo_indptr: [S + 1], token ranges from 0 on.  kv_indptr: [S + 1], ranges into kv_indices.  kv_last_page_len: [S],
    1..page size."""

    begin: int
    end: int
    qo_indptr: I32
    kv_indptr: I32
    kv_indices: I32
    kv_last_page_len: I32


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """``whole`` is all of the batch.  ``decode``: the sequences of one token before the first of several, ``prefill``: all
    others; None where there are none.  sequences, positions: [T], whose token each one is and where in its text."""

    whole: PagedRows
    decode: PagedRows | None
    prefill: PagedRows | None
    sequences: I32
    positions: I32


def plan_pages(batch: Batch) -> PagedPlan:
    """The scheduler puts single tokens first, so each kernel's rows are one run; a single token behind a chunk is a chunk
    of one, which gives the same numbers."""
    lengths = np.diff(batch.qo_indptr)
    several = np.flatnonzero(lengths > 1)
    num_decodes = int(several[0]) if len(several) else batch.num_sequences
    whole = _rows(batch, 0, batch.num_sequences)
    return PagedPlan(
        whole=whole,
        decode=_rows(batch, 0, num_decodes) if num_decodes else None,
        prefill=_rows(batch, num_decodes, batch.num_sequences) if len(several) else None,
        sequences=np.repeat(np.arange(batch.num_sequences, dtype=np.int32), lengths),
        positions=batch.positions.astype(np.int32),
    )


def _rows(batch: Batch, first: int, end: int) -> PagedRows:
    qo, kv = batch.qo_indptr[first : end + 1], batch.kv_indptr[first : end + 1]
    return PagedRows(
        begin=int(qo[0]),
        end=int(qo[-1]),
        qo_indptr=qo - qo[0],
        kv_indptr=kv - kv[0],
        kv_indices=batch.kv_indices[kv[0] : kv[-1]],
        kv_last_page_len=batch.kv_last_page_len[first:end],
    )
