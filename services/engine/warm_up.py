"""What runners have in common: the pool that they are given, and what they compute before the first request.  No torch."""

from __future__ import annotations

from services.engine.batch import Batch, Entry, build_batch
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.sampling_params import Sampling

WARM_UP_BLOCKS = 4


def check_pool(config: ModelConfig, layout: KvLayout, arena_buffer: memoryview, num_blocks: int) -> None:
    """Raises ValueError when the buffer is too small for the blocks, or the layout is not the model's."""
    nbytes = num_blocks * layout.block_nbytes
    if arena_buffer.nbytes < nbytes or arena_buffer.readonly:
        raise ValueError(f"{num_blocks} blocks need {nbytes} writable bytes; the buffer has {arena_buffer.nbytes}")
    stated = (config.revision, config.num_layers, config.num_kv_heads, config.head_dim)
    if stated != (layout.model_revision, layout.num_layers, layout.num_kv_heads, layout.head_dim):
        raise ValueError("the layout is of another model")


def warm_up_batches(block_size: int) -> list[Batch]:
    """A prompt, a step and a step of two, within ``WARM_UP_BLOCKS`` blocks."""
    prompt = Entry([0] * (3 * block_size), 0, [0, 1, 2], Sampling())
    step = Entry([0], 3 * block_size, [0, 1, 2, 3], Sampling())
    return [build_batch(entries, block_size) for entries in ([prompt], [step], [step, step])]
