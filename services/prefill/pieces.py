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
    """Where a prompt's KV lies in a region: block ``blocks[i]`` of the pool that begins at byte ``base`` has room for the
    tokens from ``first_token + i * block_size`` on."""

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
    """Copies to make, in bytes; offsets are those of the regions."""

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


def pieces(source: Placement, target: Placement, begin: int, end: int) -> Pieces:
    """What carries the KV of tokens [begin, end) between pools of one type.

    Equal layouts: whole blocks, of the last one also what lies behind ``end``; blocks begin at the same tokens on both
    sides then, and ``begin`` is one of these.  Otherwise one piece for each stretch in each layer, of its keys and of
    its values, and no byte besides."""
    ours, theirs = source.layout, target.layout
    assert (ours.content_fingerprint, ours.dtype) == (theirs.content_fingerprint, theirs.dtype)
    firsts, counts = stretches(source, target, begin, end)
    (source_blocks, source_tokens), (target_blocks, target_tokens) = source.locate(firsts), target.locate(firsts)
    source_starts = source.base + source_blocks * ours.block_nbytes
    target_starts = target.base + target_blocks * theirs.block_nbytes
    if ours == theirs:
        assert not source_tokens.any(), "a piece begins inside a block of the source"
        assert not target_tokens.any(), "a piece begins inside a block of the target"
        return Pieces(source_starts, target_starts, np.full(len(firsts), ours.block_nbytes, np.int64))
    row, planes = ours.row_nbytes, np.arange(2 * ours.num_layers)[None, :]
    sizes = np.broadcast_to((counts * row)[:, None], (len(firsts), planes.size))
    return Pieces(
        _offsets(source_starts, source_tokens, planes * ours.block_size, row),
        _offsets(target_starts, target_tokens, planes * theirs.block_size, row),
        sizes.ravel(),
    )


def _offsets(starts: I64, tokens: I64, plane_tokens: I64, row_nbytes: int) -> I64:
    offsets: I64 = starts[:, None] + (plane_tokens + tokens[:, None]) * row_nbytes
    return offsets.ravel()
