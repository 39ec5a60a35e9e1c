"""Steps in which every sequence decodes, as CUDA graphs: one for each bucket of batch sizes.

Never run on a device; tests run all of this but ``CudaDevice`` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from services.engine.attention.flashinfer_attention import (
    Appended,
    AttentionShape,
    FlashInferPlan,
    appended_arrays,
    joined,
    plan_decode,
)
from services.engine.attention.paged_plan import PagedPlan, plan_pages
from services.engine.batch import I32, Batch, Entry, build_batch
from services.engine.buckets import bucket_for, pad
from services.engine.device import Device, pinned
from services.engine.flashinfer_kernels import DecodeWrapper, FlashInfer
from services.engine.model import Inputs, LlamaModel
from services.engine.sampling_params import Sampling


@dataclass(frozen=True, slots=True)
class _Graph:
    """``places``: what ``Appended`` names, behind each other and behind the token ids, in the buffer that all graphs
    share."""

    wrapper: DecodeWrapper
    token_ids: torch.Tensor
    appended: Appended
    logits: torch.Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """Not thread-safe.  One step at a time is prepared and run; preparing the next does not disturb one that runs."""

    def __init__(self, model: LlamaModel, kv_arena: torch.Tensor, shape: AttentionShape, kernels: FlashInfer,
                 device: Device, workspace: torch.Tensor, sizes: tuple[int, ...], max_blocks: int) -> None:  # fmt: skip
        """``sizes`` ascend; ``max_blocks``: most that a sequence has."""
        self._model, self._kv_arena, self._shape, self._kernels = model, kv_arena, shape, kernels
        self._device, self._workspace, self._sizes = device, workspace, sizes
        largest = sizes[-1]
        room = 5 * largest + 1 + largest * max_blocks
        self._buffer = torch.zeros(room, dtype=torch.int32, device=device.place)
        self._graphs: dict[int, _Graph] = {}

    def capture(self) -> None:
        """All of them, which takes a while; what a block holds before is there again after.  Blocks."""
        kept = self._kv_arena[0].clone()
        for size in reversed(self._sizes):  # smaller ones fit into the memory of larger ones
            self._graphs[size] = self._capture(size)
        self._kv_arena[0].copy_(kept)
        self._device.mark().wait()

    def takes(self, batch: Batch) -> bool:
        return bucket_for(batch, self._sizes) is not None

    def prepare(self, batch: Batch) -> int:
        """All that a step needs but its token ids, on its way to the device; returns which graph it is for."""
        size = bucket_for(batch, self._sizes)
        assert size is not None
        pages = plan_pages(pad(batch, size))
        graph = self._graphs[size]
        self._store(size, appended_arrays(pages))
        self._plan(graph.wrapper, graph.appended, pages)
        return size

    def run(self, size: int, batch: Batch) -> torch.Tensor:
        """Logits, [sequences, vocab], of the step that was prepared last, with the token ids of ``batch``.  They hold until
        the next run."""
        graph = self._graphs[size]
        token_ids = torch.from_numpy(pad(batch, size).token_ids.astype(np.int32))
        graph.token_ids.copy_(pinned(token_ids, self._device.place), non_blocking=True)
        graph.replay()
        return graph.logits[: batch.num_sequences]

    def _store(self, size: int, arrays: list[I32]) -> None:
        host = joined(arrays, self._device.place)
        self._buffer[size : size + len(host)].copy_(host, non_blocking=True)

    def _plan(self, wrapper: DecodeWrapper, appended: Appended, pages: PagedPlan) -> None:
        plan_decode(wrapper, pages.whole, appended.kv_indices[: len(pages.whole.kv_indices)], self._shape)

    def _capture(self, size: int) -> _Graph:
        parts = self._buffer.split_with_sizes([size, size, size, size + 1, size, len(self._buffer) - 5 * size - 1])
        token_ids, appended = parts[0], Appended(*parts[1:])
        wrapper = self._kernels.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self._shape.uses_tensor_cores,
            paged_kv_indptr_buffer=appended.kv_indptr,
            paged_kv_indices_buffer=appended.kv_indices,
            paged_kv_last_page_len_buffer=appended.kv_last_page_len,
        )
        pages = plan_pages(pad(build_batch([Entry([0], 0, [0], Sampling())], self._shape.block_size), size))
        self._store(size, appended_arrays(pages))
        token_ids.zero_()
        self._plan(wrapper, appended, pages)
        plan = FlashInferPlan(self._kernels, appended, wrapper, None, size)
        inputs = Inputs(token_ids, appended.positions, None)
        logits, replay = self._device.capture(lambda: self._model.forward(inputs, self._kv_arena, plan))
        return _Graph(wrapper, token_ids, appended, logits, replay)
