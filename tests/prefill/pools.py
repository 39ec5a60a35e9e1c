"""Small layouts and placements at random, and pools as arrays that numpy indexes by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from services.engine.layout import KvLayout
from services.prefill.pieces import Placement

U8 = npt.NDArray[np.uint8]

layouts = st.builds(
    KvLayout,
    model_revision=st.just("r"),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    block_size=st.integers(1, 9),
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([2, 4]),
)


@st.composite
def placements(draw: st.DrawFn, layout: KvLayout, num_tokens: int, num_skipped_blocks: int = 0) -> Placement:
    """For tokens from the first block that is not skipped to ``num_tokens``, in permuted blocks of a larger pool."""
    num_blocks = -(-num_tokens // layout.block_size) - num_skipped_blocks
    blocks = draw(st.permutations(range(num_blocks + 3)))[:num_blocks]
    base = layout.block_nbytes * draw(st.integers(0, 2))
    return Placement(layout, tuple(blocks), num_skipped_blocks * layout.block_size, base)


@st.composite
def sides(draw: st.DrawFn, *, same_dtype: bool) -> tuple[Placement, Placement, int, int]:
    """Source and target of one prompt, and a range of its tokens that both have blocks for and that begins a block of the
    target's.  The target lacks some leading blocks, for the owner had them."""
    ours = draw(layouts)
    theirs = replace(ours, block_size=draw(st.integers(1, 9)))
    if not same_dtype:
        theirs = replace(theirs, dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])))
    num_tokens = draw(st.integers(1, 40))
    num_blocks = -(-num_tokens // theirs.block_size)
    num_skipped = draw(st.integers(0, num_blocks))
    source = draw(placements(ours, num_tokens))
    target = draw(placements(theirs, num_tokens, num_skipped))
    begin = draw(st.integers(num_skipped, num_blocks)) * theirs.block_size
    end = draw(st.integers(begin, max(begin, num_tokens)))
    return source, target, begin, end


def region_nbytes(placement: Placement) -> int:
    return placement.base + (len(placement.blocks) + 3) * placement.layout.block_nbytes


def rows(region: U8, placement: Placement) -> U8:
    """[block, layer, key or value, token, bytes of a row], a view."""
    layout = placement.layout
    pool = region[placement.base :]
    num_blocks = len(pool) // layout.block_nbytes
    return pool[: num_blocks * layout.block_nbytes].reshape(num_blocks, *layout.block_shape[:3], layout.row_nbytes)


def token_rows(region: U8, placement: Placement, token: int) -> U8:
    """[layer, key or value, bytes of a row] of one token, a view."""
    index, offset = divmod(token - placement.first_token, placement.layout.block_size)
    return rows(region, placement)[placement.blocks[index], :, :, offset]
