"""Runs batches by torch, over a KV pool that somebody else owns."""

from __future__ import annotations

from contextlib import nullcontext
from math import prod

import numpy as np
import torch

from services.engine.attention.torch_attention import TorchAttention
from services.engine.batch import Batch
from services.engine.device import Device
from services.engine.layout import KvLayout
from services.engine.model import Inputs, LlamaModel
from services.engine.model_config import ModelConfig
from services.engine.operations.torch_operations import TorchOperations
from services.engine.parallel.group import ALONE, Group
from services.engine.sampler import F32, draw
from services.engine.steps import Blocking, Draws
from services.engine.warm_up import WARM_UP_BLOCKS, check_pool, warm_up_batches
from services.engine.weights import DTYPES, Weights


class _Steps:
    """Not thread-safe: one thread calls it, and each call blocks until the numbers are there."""

    runs_ahead = False

    def __init__(self, config: ModelConfig, weights: Weights, layout: KvLayout, kv_arena: torch.Tensor, group: Group,
                 device: Device | None) -> None:  # fmt: skip
        """``kv_arena``, [num_blocks, *layout.block_shape], and ``weights`` are on the ``device``; None is the CPU.  With a
        ``group`` all else is of one rank's shard."""
        if weights.embedding.dtype != DTYPES[layout.dtype]:
            raise ValueError(f"the weights are {weights.embedding.dtype}, the layout says {layout.dtype}")
        place = kv_arena.device
        self._layout, self._arena, self._device = layout, kv_arena, device
        self._model = LlamaModel(config, weights, TorchOperations(config, place, DTYPES[layout.dtype]), group)
        self._attention = TorchAttention(
            block_size=layout.block_size, sliding_window=config.sliding_window, device=place
        )

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
        return np.asarray(self._forward(batch, self._arena).float().cpu().numpy(), dtype=np.float32)

    def warm_up(self) -> None:
        """Computes a few steps on a pool of its own, so that the first request does not pay for torch's first-call work."""
        shape = (WARM_UP_BLOCKS, *self._layout.block_shape)
        scratch = torch.zeros(shape, dtype=self._arena.dtype, device=self._arena.device)
        for batch in warm_up_batches(self._layout.block_size):
            self._forward(batch, scratch)

    def _forward(self, batch: Batch, arena: torch.Tensor) -> torch.Tensor:
        """[samples, vocab], where it was computed."""
        device = self._device
        with nullcontext() if device is None else device.current(), torch.inference_mode():
            logits = self._model.forward(inputs_on(arena.device, batch), arena, self._attention.plan(batch))
            if device is not None:  # a step without samples leaves no logits to be copied, and so to be waited for
                device.mark().wait()
            return logits


class TorchRunner(_Steps):
    """On the CPU.  ``arena_buffer`` is written and read in place and must outlive the runner; a block that a peer is
    writing may be in it as long as no batch names it.
    """

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
        flat = torch.frombuffer(arena_buffer, dtype=DTYPES[layout.dtype], count=num_blocks * prod(layout.block_shape))
        super().__init__(config, weights, layout, flat.view(num_blocks, *layout.block_shape), group, None)
        torch.set_num_threads(num_threads)


class DeviceTorchRunner(_Steps):
    """On a GPU: what FlashInfer's kernels are compared with there, and what computes types and heads that they have not.  A
    step waits for the device many times, for each array of its plan that it copies there.

    Never run on a device: tests run it on the CPU with a stand-in for the device, and without numbers on torch's ``meta``.
    """

    def __init__(self, config: ModelConfig, weights: Weights, layout: KvLayout, kv_arena: torch.Tensor, device: Device,
                 group: Group = ALONE) -> None:  # fmt: skip
        """As ``FlashInferRunner``."""
        super().__init__(config, weights, layout, kv_arena, group, device)


def inputs_on(place: torch.device, batch: Batch) -> Inputs:
    rows = torch.tensor([sample.row for sample in batch.samples], dtype=torch.long, device=place)
    return Inputs(torch.from_numpy(batch.token_ids).to(place), torch.from_numpy(batch.positions).to(place), rows)
