"""What a KV block holds, as one number: equal on both sides of a transfer exactly when the right bytes arrived."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from services.engine.layout import KvLayout


def digest_blocks(
    pool: memoryview, layout: KvLayout, blocks: Sequence[int], first_index: int, num_prompt_tokens: int
) -> list[int]:
    """XXH3-64 of each of ``blocks``, of which ``blocks[i]`` holds block ``first_index + i`` of a prompt.

    A digest covers the KV of the prompt's tokens in the order layer, key then value, token, head, dimension, and not what
    a partial block holds behind them.  It is seeded with the index in the prompt, so that blocks which changed places are
    noticed; where in the pool a block lies does not matter.  Releases the GIL while it reads; the caller sees to it that
    nobody writes meanwhile."""
    nbytes = layout.block_nbytes
    digests = []
    for index, block in enumerate(blocks, first_index):
        num_tokens = min(layout.block_size, num_prompt_tokens - index * layout.block_size)
        assert num_tokens > 0, f"block {index} is behind the end of a prompt of {num_prompt_tokens} tokens"
        digests.append(_digest(pool[block * nbytes : (block + 1) * nbytes], layout, index, num_tokens))
    return digests


def digest_on_ranks(
    regions: Sequence[memoryview], layout: KvLayout, blocks: Sequence[int], first_index: int, num_prompt_tokens: int
) -> list[int]:
    """As ``digest_blocks``, of blocks that lie in the regions of ``layout.tp`` ranks, each its heads: a digest of what each
    region's would be alone.  Of one rank, that one itself."""
    of_ranks = [
        digest_blocks(region, layout.of_rank(rank), blocks, first_index, num_prompt_tokens)
        for rank, region in enumerate(regions)
    ]
    assert len(of_ranks) == layout.tp
    if layout.tp == 1:
        return of_ranks[0]
    return [xxhash.xxh3_64_intdigest(np.array(parts, np.uint64).tobytes()) for parts in zip(*of_ranks, strict=True)]


def _digest(block: memoryview, layout: KvLayout, index: int, num_tokens: int) -> int:
    if num_tokens == layout.block_size:
        return xxhash.xxh3_64_intdigest(block, seed=index)
    # Tokens are the outermost axis of each layer's keys and values, so the valid ones are one run in each.
    stride = block.nbytes // (2 * layout.num_layers)
    run = stride // layout.block_size * num_tokens
    state = xxhash.xxh3_64(seed=index)
    for begin in range(0, block.nbytes, stride):
        state.update(block[begin : begin + run])
    return state.intdigest()
