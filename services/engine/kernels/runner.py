"""Runs batches by the compiled kernels, over a KV pool that somebody else owns."""

from __future__ import annotations

from services.engine.batch import Batch
from services.engine.kernels.model import F32, CompiledModel
from services.engine.kernels.packed import PackedWeights
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.sampler import draw
from services.engine.sampling_params import DrawFailed, Drawn
from services.engine.warm_up import WARM_UP_BLOCKS, check_pool, warm_up_batches


class CompiledRunner:
    """As ``TorchRunner``: the same calls, the same ownership of ``arena_buffer``."""

    ready = None

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
        """``num_threads`` counts the caller's.  Raises KernelsUnavailable; ``instruction_set``: see ``CompiledModel``."""
        check_pool(config, layout, arena_buffer, num_blocks)
        self._layout = layout
        self._arena = arena_buffer
        self._num_blocks = num_blocks
        self.model = CompiledModel(config, weights, layout, num_threads=num_threads, instruction_set=instruction_set)

    @property
    def late_s(self) -> float:
        return self.model.late_s

    def run(self, batch: Batch) -> list[Drawn | DrawFailed | None]:
        return draw(self.logits(batch), batch.samples)

    def logits(self, batch: Batch) -> F32:
        return self.model.forward(batch, self._arena, self._num_blocks)

    def warm_up(self) -> None:
        """On a pool of its own: memory that steps work in, and weights, are there before the first request."""
        scratch = memoryview(bytearray(WARM_UP_BLOCKS * self._layout.block_nbytes))
        for batch in warm_up_batches(self._layout.block_size):
            self.model.forward(batch, scratch, WARM_UP_BLOCKS)
