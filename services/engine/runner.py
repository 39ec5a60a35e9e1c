"""Runs batches by torch, over a KV pool that somebody else owns."""

from __future__ import annotations

from math import prod

import numpy as np
import torch

from services.engine.attention.torch_attention import TorchAttention
from services.engine.batch import Batch
from services.engine.layout import KvLayout
from services.engine.model import Inputs, LlamaModel
from services.engine.model_config import ModelConfig
from services.engine.operations.torch_operations import TorchOperations
from services.engine.parallel.group import ALONE, Group
from services.engine.sampler import F32, draw
from services.engine.steps import Blocking, Draws
from services.engine.warm_up import WARM_UP_BLOCKS, check_pool, warm_up_batches
from services.engine.weights import DTYPES, Weights


class TorchRunner:
    """Not thread-safe: one thread calls it, and each call blocks until the numbers are there.

    ``arena_buffer`` is written and read in place and must outlive the runner; a block that a peer is writing may be in it
    as long as no batch names it.
    """

    runs_ahead = False

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layout: KvLayout,
        arena_buffer: memoryview,
        num_blocks: int,
        num_threads: int,
        group: Group = ALONE,
    ) -> None:
        """``arena_buffer``: writable, at least ``num_blocks * layout.block_nbytes`` bytes.  ``num_threads`` holds for all
        of torch in this process.  With a ``group`` all else is of one rank's shard."""
        check_pool(config, layout, arena_buffer, num_blocks)
        if weights.embedding.dtype != DTYPES[layout.dtype]:
            raise ValueError(f"the weights are {weights.embedding.dtype}, the layout says {layout.dtype}")
        torch.set_num_threads(num_threads)
        self._layout = layout
        operations = TorchOperations(config, torch.device("cpu"), DTYPES[layout.dtype])
        self._model = LlamaModel(config, weights, operations, group)
        self._attention = TorchAttention(block_size=layout.block_size, sliding_window=config.sliding_window)
        flat = torch.frombuffer(arena_buffer, dtype=DTYPES[layout.dtype], count=num_blocks * prod(layout.block_shape))
        self._arena = flat.view(num_blocks, *layout.block_shape)

    def start(self, batch: Batch) -> Blocking:
        return Blocking(lambda: self.run(batch))

    def run(self, batch: Batch) -> Draws:
        """One drawn token per entry of ``batch.samples``, in their order, None behind a draft that is not what was drawn.
        The KV of all new tokens is in the pool."""
        return draw(self.logits(batch), batch.samples)

    def follow(self, batch: Batch) -> None:
        """Computes the step, as a rank that draws nothing."""
        self._forward(batch, self._arena)

    def logits(self, batch: Batch) -> F32:
        """As ``run``, but what it would draw from: [len(batch.samples), vocab] in float32."""
        return self._forward(batch, self._arena)

    def warm_up(self) -> None:
        """Computes a few steps on a pool of its own, so that the first request does not pay for torch's first-call work."""
        scratch = torch.zeros((WARM_UP_BLOCKS, *self._layout.block_shape), dtype=self._arena.dtype)
        for batch in warm_up_batches(self._layout.block_size):
            self._forward(batch, scratch)

    def _forward(self, batch: Batch, arena: torch.Tensor) -> F32:
        with torch.inference_mode():
            logits = self._model.forward(cpu_inputs(batch), arena, self._attention.plan(batch))
            return np.asarray(logits.float().numpy(), dtype=np.float32)


def cpu_inputs(batch: Batch) -> Inputs:
    rows = torch.tensor([sample.row for sample in batch.samples], dtype=torch.long)
    return Inputs(torch.from_numpy(batch.token_ids), torch.from_numpy(batch.positions), rows)
