"""Which bytes of one pool become which bytes of another.  Pure: placements and a range of tokens in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.engine.layout import KvLayout

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a prompt's KV lies in a region, or in that of each rank: block ``blocks[i]`` of the pool that begins at byte
    ``base`` has room for the tokens from ``first_token + i * block_size`` on."""

    layout: KvLayout
    blocks: Sequence[int]
    first_token: int = 0
    base: int = 0

    def locate(self, tokens: I64) -> tuple[I64, I64]:
        """The block that each of these tokens lies in, and which of the block's tokens it is."""
        indices, offsets = np.divmod(tokens - self.first_token, self.layout.block_size)
        assert (indices >= 0).all(), "a token before the first block"
        return np.asarray(self.blocks, np.int64)[indices], offsets


@dataclass(frozen=True, slots=True)
class Pieces:
    """Copies to make, in bytes; offsets are those of the regions of the two ranks."""

    source_rank: int
    target_rank: int
    source_offsets: I64
    target_offsets: I64
    sizes: I64


def stretches(source: Placement, target: Placement, begin: int, end: int) -> tuple[I64, I64]:
    """Tokens [begin, end), cut wherever a block begins on either side: the first token of each stretch, and how many it
    has."""
    cuts = [np.array([begin], np.int64)]
    for side in (source, target):
        size = side.layout.block_size
        cuts.append(np.arange(begin + (side.first_token - begin) % size, end, size))
    firsts = np.unique(np.concatenate(cuts)) if begin < end else np.empty(0, np.int64)
    return firsts, np.diff(firsts, append=end)


def pieces(source: Placement, target: Placement, begin: int, end: int) -> list[Pieces]:
    """What carries the KV of tokens [begin, end) between pools of one type, for each two ranks that share a head.

    Equal layouts: whole blocks, of the last one also what lies behind ``end``; blocks begin at the same tokens on both
    sides then, and ``begin`` is one of these.  Otherwise no byte besides: one piece for each stretch in each layer, of its
    keys and of its values, or, where one rank has heads that the other has not, for each token of it."""
    ours, theirs = source.layout, target.layout
    assert (ours.content_fingerprint, ours.dtype) == (theirs.content_fingerprint, theirs.dtype)
    firsts, counts = stretches(source, target, begin, end)
    if ours == theirs:
        return [_whole_blocks(source, target, firsts, rank) for rank in range(ours.tp)]
    return [
        _runs(source, target, firsts, counts, source_rank, target_rank)
        for source_rank, our_heads in enumerate(ours.head_shares)
        for target_rank, their_heads in enumerate(theirs.head_shares)
        if max(our_heads.start, their_heads.start) < min(our_heads.stop, their_heads.stop)
    ]


def _whole_blocks(source: Placement, target: Placement, firsts: I64, rank: int) -> Pieces:
    (source_blocks, source_tokens), (target_blocks, target_tokens) = source.locate(firsts), target.locate(firsts)
    assert not source_tokens.any(), "a piece begins inside a block of the source"
    assert not target_tokens.any(), "a piece begins inside a block of the target"
    nbytes = source.layout.of_rank(rank).block_nbytes
    starts = source.base + source_blocks * nbytes, target.base + target_blocks * nbytes
    return Pieces(rank, rank, *starts, np.full(len(firsts), nbytes, np.int64))


def _runs(source: Placement, target: Placement, firsts: I64, counts: I64, source_rank: int, target_rank: int) -> Pieces:
    our_heads, their_heads = source.layout.head_shares[source_rank], target.layout.head_shares[target_rank]
    first_head = max(our_heads.start, their_heads.start)
    num_heads = min(our_heads.stop, their_heads.stop) - first_head
    if not num_heads == len(our_heads) == len(their_heads):  # a token's heads are no run to the next token's
        total = int(counts.sum())
        begin = firsts[0] if total else 0
        firsts, counts = np.arange(begin, begin + total, dtype=np.int64), np.ones(total, np.int64)
    planes = np.arange(2 * source.layout.num_layers)[None, :]
    head_nbytes = source.layout.row_nbytes // source.layout.num_kv_heads
    sizes = np.broadcast_to((counts * num_heads * head_nbytes)[:, None], (len(firsts), planes.size))
    return Pieces(
        source_rank,
        target_rank,
        _offsets(source, firsts, source_rank, planes, (first_head - our_heads.start) * head_nbytes),
        _offsets(target, firsts, target_rank, planes, (first_head - their_heads.start) * head_nbytes),
        sizes.ravel(),
    )


def _offsets(place: Placement, tokens: I64, rank: int, planes: I64, within_row: int) -> I64:
    layout = place.layout.of_rank(rank)
    blocks, places = place.locate(tokens)
    rows = planes * layout.block_size + places[:, None]
    offsets: I64 = place.base + blocks[:, None] * layout.block_nbytes + rows * layout.row_nbytes + within_row
    return offsets.ravel()
