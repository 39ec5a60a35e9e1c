"""Runs batches by the compiled kernels, over a KV pool that somebody else owns."""

from __future__ import annotations

from services.engine.batch import Batch
from services.engine.kernels.model import F32, CompiledModel, CompiledStep
from services.engine.kernels.packed import PackedWeights
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.steps import Draws
from services.engine.warm_up import WARM_UP_BLOCKS, check_pool, warm_up_batches


class CompiledRunner:
    """As ``TorchRunner``: the same calls, the same ownership of ``arena_buffer``."""

    runs_ahead = True

    def __init__(
        self,
        config: ModelConfig,
        weights: PackedWeights,
        layout: KvLayout,
        arena_buffer: memoryview,
        num_blocks: int,
        num_threads: int,
        *,
        instruction_set: str | None = None,
    ) -> None:
        """``num_threads`` compute, none of them the caller's.  Raises KernelsUnavailable; ``instruction_set``: see
        ``CompiledModel``."""
        check_pool(config, layout, arena_buffer, num_blocks)
        self._layout = layout
        self._arena = arena_buffer
        self._num_blocks = num_blocks
        self.model = CompiledModel(config, weights, layout, num_threads=num_threads, instruction_set=instruction_set)

    def start(self, batch: Batch) -> CompiledStep:
        return self.model.start(batch, self._arena, self._num_blocks)

    def run(self, batch: Batch) -> Draws:
        """``start`` and its draws; blocks."""
        return self.start(batch).result().draws

    def logits(self, batch: Batch) -> F32:
        return self.model.logits(batch, self._arena, self._num_blocks)

    def warm_up(self) -> None:
        """On a pool of its own: memory that steps work in, and weights, are there before the first request."""
        scratch = memoryview(bytearray(WARM_UP_BLOCKS * self._layout.block_nbytes))
        for batch in warm_up_batches(self._layout.block_size):
            self.model.start(batch, scratch, WARM_UP_BLOCKS).result()
