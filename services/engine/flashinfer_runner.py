"""Runs batches on a CUDA device by FlashInfer's kernels, over a KV pool that somebody else owns.

Never run on a device: tests run it on CPU, with stand-ins for the kernels and for CUDA's graphs and events.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from services.engine.attention.flashinfer_attention import (
    WORKSPACE_NBYTES,
    AttentionShape,
    FlashInferAttention,
    upload,
)
from services.engine.batch import Batch, following, same_places
from services.engine.buckets import bucket_sizes
from services.engine.decode_graphs import DecodeGraphs
from services.engine.device import Device
from services.engine.device_sampler import SamplingColumns, TopK, choose, drawn_tokens
from services.engine.flashinfer_kernels import FlashInfer
from services.engine.layout import KvLayout
from services.engine.model import Inputs, LlamaModel
from services.engine.model_config import ModelConfig
from services.engine.operations.flashinfer_operations import FlashInferOperations
from services.engine.parallel.group import ALONE, Group
from services.engine.ready import Ready
from services.engine.sampler import F32
from services.engine.steps import Blocking, Draws
from services.engine.warm_up import WARM_UP_BLOCKS, warm_up_batches
from services.engine.weights import DTYPES, Weights


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A step that was foreseen: its metadata is on the device, for the graph of that size."""

    batch: Batch
    size: int


class FlashInferRunner:
    """Not thread-safe: one thread calls it.  A step waits for the device once, for its drawn tokens; while it does, the
    metadata of the step that follows has been made (``Limits.look_ahead`` gives it the blocks).

    With ``returns_early``, a step that draws nothing returns while it still runs, and ``ready`` says when its KV is in the
    pool; it has waited for the step before.  Only for pools whose blocks nobody but this runner writes: a block that was
    freed early may be written by a step that still runs."""

    runs_ahead = False

    def __init__(self, config: ModelConfig, weights: Weights, layout: KvLayout, kv_arena: torch.Tensor,
                 kernels: FlashInfer, device: Device, *, max_running: int, returns_early: bool,
                 group: Group = ALONE) -> None:  # fmt: skip
        """``weights`` and ``kv_arena``, [num_blocks, *layout.block_shape], are on the device.  With a ``group`` all else is
        of one rank's shard."""
        self.ready: Ready | None = None
        self.num_foreseen = 0  # steps whose metadata was there before they came
        self._layout = layout
        self._top_k = top_k_of(kernels)
        self._device, self._returns_early = device, returns_early
        shape = AttentionShape(
            config.num_heads, config.num_kv_heads, config.head_dim, layout.block_size, config.sliding_window,
            DTYPES[layout.dtype],
        )  # fmt: skip
        place = device.place
        self._kv_arena = kv_arena
        with device.current():
            workspace = torch.zeros(WORKSPACE_NBYTES, dtype=torch.uint8, device=place)
            self._model = LlamaModel(config, weights, FlashInferOperations(config, kernels, place), group)
            self._attention = FlashInferAttention(shape, kernels, place, workspace)
            self._graphs = DecodeGraphs(
                self._model, kv_arena, shape, kernels, device, workspace, bucket_sizes(max_running),
                -(-config.context_length // layout.block_size),
            )  # fmt: skip
        self._prepared: _Prepared | None = None
        self._uploaded: Ready | None = None

    def start(self, batch: Batch) -> Blocking:
        return Blocking(lambda: self.run(batch), lambda: self.ready)

    def run(self, batch: Batch) -> Draws:
        """As ``TorchRunner.run``, save for what ``returns_early`` says."""
        with self._computing():
            before, self.ready = self.ready, None
            logits = self._forward(batch)
            if not batch.samples:
                self._wait_unless_early(before)
                return []
            columns = SamplingColumns.of(batch.samples).to(self._device.place)  # made while the device computes
            chosen = self._device.fetch(choose(logits, columns, self._top_k))
            drawn = self._device.mark()
            self._foresee(batch)
            drawn.wait()
            return drawn_tokens(chosen.tolist(), batch.samples, lambda number: logits[number])

    def follow(self, batch: Batch) -> None:
        """As ``TorchRunner.follow``; with ``returns_early`` a step that draws nothing may still run when it returns."""
        with self._computing():
            before, self.ready = self.ready, None
            self._forward(batch)
            if not batch.samples:
                self._wait_unless_early(before)
                return
            computed = self._device.mark()
            self._foresee(batch)
            computed.wait()

    def logits(self, batch: Batch) -> F32:
        """As ``TorchRunner.logits``."""
        with self._computing():
            return np.asarray(self._forward(batch).float().cpu().numpy(), dtype=np.float32)

    def warm_up(self) -> None:
        """Compiles what kernels are missing, minutes at the first time on a machine, and captures the graphs.  On a pool of
        its own, or on a block that it puts back as it was."""
        place = self._device.place
        with self._computing():
            scratch = torch.zeros((WARM_UP_BLOCKS, *self._layout.block_shape), dtype=self._kv_arena.dtype, device=place)
            for batch in warm_up_batches(self._layout.block_size):
                logits = self._model.forward(self._inputs(batch), scratch, self._attention.plan(batch))
                choose(logits, SamplingColumns.of(batch.samples).to(place), self._top_k)
                self._device.mark().wait()
            self._graphs.capture()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """On whatever thread calls: the first calls are often another's than the steps'."""
        with self._device.current(), torch.inference_mode():
            yield

    def _forward(self, batch: Batch) -> torch.Tensor:
        """[samples, vocab], on the device; started, no more."""
        prepared, self._prepared = self._prepared, None
        if not self._graphs.takes(batch):
            self._settle_uploads()
            plan = self._attention.plan(batch)
            self._uploaded = self._device.mark()
            return self._model.forward(self._inputs(batch), self._kv_arena, plan)
        if prepared is not None and same_places(prepared.batch, batch):
            self.num_foreseen += 1
            size = prepared.size
        else:
            size = self._prepare(batch)
        logits = self._graphs.run(size, batch)
        if len(batch.samples) == batch.num_sequences:
            return logits
        return logits[self._rows(batch)]

    def _foresee(self, batch: Batch) -> None:
        step = following(batch, self._layout.block_size)
        if step is not None and self._graphs.takes(step):
            self._prepared = _Prepared(step, self._prepare(step))

    def _prepare(self, batch: Batch) -> int:
        self._settle_uploads()
        size = self._graphs.prepare(batch)
        self._uploaded = self._device.mark()
        return size

    def _settle_uploads(self) -> None:
        """The kernels' planners copy from pinned memory that the next plan overwrites."""
        if self._uploaded is not None:
            self._uploaded.wait()

    def _wait_unless_early(self, before: Ready | None) -> None:
        ready = self._device.mark()
        if not self._returns_early:
            ready.wait()
            return
        if before is not None:
            before.wait()
        self.ready = ready

    def _inputs(self, batch: Batch) -> Inputs:
        token_ids, positions = upload(
            [batch.token_ids.astype(np.int32), batch.positions.astype(np.int32)], self._device.place
        )
        return Inputs(token_ids, positions, self._rows(batch))

    def _rows(self, batch: Batch) -> torch.Tensor:
        (rows,) = upload([np.array([sample.row for sample in batch.samples], np.int32)], self._device.place)
        return rows


def top_k_of(kernels: FlashInfer) -> TopK:
    """Of equals at the edge the lower ids, and the same every time."""

    def top_k(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.top_k(logits, count, sorted=False, deterministic=True, tie_break=1)

    return top_k


class _CudaMemory:
    """Memory that torch did not allocate, in the terms of the CUDA array interface."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


def cuda_arena(address: int, num_blocks: int, layout: KvLayout, place: torch.device, owner: object) -> torch.Tensor:
    """A tensor over a pool on the device, [num_blocks, *layout.block_shape], which keeps ``owner`` alive."""
    memory = _CudaMemory(address, num_blocks * layout.block_nbytes, owner)
    flat = torch.as_tensor(memory, device=place).view(DTYPES[layout.dtype])
    return flat[: num_blocks * prod(layout.block_shape)].view(num_blocks, *layout.block_shape)
