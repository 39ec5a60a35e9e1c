"""Paged attention by FlashInfer's kernels (https://arxiv.org/abs/2501.01005), for bfloat16 and float16 on CUDA.

Never run on a device: what calls the kernels is tested on CPU with a stand-in for them (tests/engine/fake_flashinfer.py)
whose signatures are compared with the package's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from services.engine.attention.paged_plan import PagedPlan, PagedRows, plan_pages
from services.engine.batch import I32, Batch
from services.engine.device import pinned

if TYPE_CHECKING:
    from services.engine.flashinfer_kernels import DecodeWrapper, FlashInfer, PrefillWrapper

WORKSPACE_NBYTES = 128 << 20  # what FlashInfer recommends, for the partial results of split sequences
# From so many heads a KV head on, tensor cores are the faster ones; groups of 5 and 7 have no other kernel.
TENSOR_CORE_GROUP = 4


@dataclass(frozen=True, slots=True)
class AttentionShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    sliding_window: int | None
    dtype: torch.dtype

    @property
    def uses_tensor_cores(self) -> bool:
        return self.num_heads // self.num_kv_heads >= TENSOR_CORE_GROUP

    @property
    def window_left(self) -> int:
        """How many tokens before its own one sees; FlashInfer counts without it, and -1 is all."""
        return -1 if self.sliding_window is None else self.sliding_window - 1


class FlashInferAttention:
    """Not thread-safe.  ``plan`` copies to the device without waiting for it: the kernels' planners read what is on the
    host there and then, and what travels does so from pinned memory."""

    def __init__(
        self, shape: AttentionShape, kernels: FlashInfer, device: torch.device, workspace: torch.Tensor
    ) -> None:
        """``workspace``: WORKSPACE_NBYTES zeroed bytes on ``device``, shared by all that run in one stream."""
        self._shape = shape
        self._kernels = kernels
        self._device = device
        self._prefill = kernels.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._decode = kernels.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=shape.uses_tensor_cores
        )

    def plan(self, batch: Batch) -> FlashInferPlan:
        pages = plan_pages(batch)
        appended = Appended.of(pages, self._device)
        decode = prefill = None
        if pages.decode is not None:
            indices = appended.kv_indices[: len(pages.decode.kv_indices)]
            plan_decode(self._decode, pages.decode, indices, self._shape)
            decode = self._decode
        if pages.prefill is not None:
            rows = pages.prefill
            indices = appended.kv_indices[len(appended.kv_indices) - len(rows.kv_indices) :]
            qo_indptr, kv_indptr, last_page_len = stage(
                [rows.qo_indptr, rows.kv_indptr, rows.kv_last_page_len], self._device
            )
            self._prefill.plan(
                qo_indptr,
                kv_indptr,
                indices,
                last_page_len,
                self._shape.num_heads,
                self._shape.num_kv_heads,
                self._shape.head_dim,
                self._shape.block_size,
                causal=True,
                window_left=self._shape.window_left,
                q_data_type=self._shape.dtype,
                kv_data_type=self._shape.dtype,
            )
            prefill = self._prefill
        num_decodes = pages.decode.end if pages.decode is not None else 0
        return FlashInferPlan(self._kernels, appended, decode, prefill, num_decodes)


def plan_decode(wrapper: DecodeWrapper, rows: PagedRows, indices: torch.Tensor, shape: AttentionShape) -> None:
    """``indices``: kv_indices where the kernels run; the other arrays are wanted on the host."""
    kv_indptr, last_page_len = stage([rows.kv_indptr, rows.kv_last_page_len], indices.device)
    wrapper.plan(
        kv_indptr,
        indices,
        last_page_len,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.block_size,
        window_left=shape.window_left,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
    )


@dataclass(frozen=True, slots=True)
class Appended:
    """Where the new tokens' KV goes, on the device: what ``append_paged_kv_cache`` takes.  ``kv_indices`` may have room for
    more than the step's."""

    sequences: torch.Tensor
    positions: torch.Tensor
    kv_indptr: torch.Tensor
    kv_last_page_len: torch.Tensor
    kv_indices: torch.Tensor

    @classmethod
    def of(cls, pages: PagedPlan, device: torch.device) -> Appended:
        return cls(*upload(appended_arrays(pages), device))


def appended_arrays(pages: PagedPlan) -> list[I32]:
    """In the order of ``Appended``: all but the last have as many numbers in any step of so many sequences and tokens."""
    whole = pages.whole
    return [pages.sequences, pages.positions, whole.kv_indptr, whole.kv_last_page_len, whole.kv_indices]


def upload(arrays: list[I32], device: torch.device) -> list[torch.Tensor]:
    """On ``device``, behind each other, by one copy, for each has its price; nobody waits for it."""
    return _split(joined(arrays, device).to(device, non_blocking=True), arrays)


def stage(arrays: list[I32], device: torch.device) -> list[torch.Tensor]:
    """On the host, for whoever reads them there and copies them to ``device``, too: nobody waits for that."""
    return _split(joined(arrays, device), arrays)


def joined(arrays: list[I32], device: torch.device) -> torch.Tensor:
    """One behind the other on the host, where a copy to ``device`` keeps nobody waiting."""
    return pinned(torch.from_numpy(np.concatenate(arrays)), device)


def _split(whole: torch.Tensor, arrays: list[I32]) -> list[torch.Tensor]:
    return list(whole.split_with_sizes([len(array) for array in arrays]))


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """The first ``num_decodes`` tokens are decoded, the others are of chunks."""

    kernels: FlashInfer
    appended: Appended
    decode: DecodeWrapper | None
    prefill: PrefillWrapper | None
    num_decodes: int

    def append(self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor) -> None:
        to = self.appended
        self.kernels.append_paged_kv_cache(
            key, value, to.sequences, to.positions, kv_layer, to.kv_indices, to.kv_indptr, to.kv_last_page_len, "NHD"
        )

    def run(self, queries: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
        attended = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        decoded, chunks = slice(None, self.num_decodes), slice(self.num_decodes, None)
        if self.decode is not None:
            self.decode.run(queries[decoded], kv_layer, out=attended[decoded])
        if self.prefill is not None:
            self.prefill.run(queries[chunks], kv_layer, out=attended[chunks])
        return attended
