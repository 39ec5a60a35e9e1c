"""What is used of FlashInfer: the package itself has these, and so has the stand-in that tests compute with on CPU.

The package imports without a GPU and fails at the first call, so an import proves nothing: see ``load``.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch

from services.engine.model_config import ModelError

HEAD_DIMS = (64, 128, 256)
DTYPES = ("bfloat16", "float16")


class PrefillWrapper(Protocol):
    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        window_left: int = -1,
        q_data_type: torch.dtype = ...,
        kv_data_type: torch.dtype | None = None,
    ) -> None: ...

    def run(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...


class DecodeWrapper(Protocol):
    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        q_data_type: torch.dtype | None = ...,
        kv_data_type: torch.dtype | None = None,
    ) -> None: ...

    def run(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...


class FlashInfer(Protocol):
    """The package's names, and of their parameters those that are used."""

    def BatchPrefillWithPagedKVCacheWrapper(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str
    ) -> PrefillWrapper: ...

    def BatchDecodeWithPagedKVCacheWrapper(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        *,
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> DecodeWrapper: ...

    def append_paged_kv_cache(
        self,
        append_key: torch.Tensor,
        append_value: torch.Tensor,
        batch_indices: torch.Tensor,
        positions: torch.Tensor,
        paged_kv_cache: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_last_page_len: torch.Tensor,
        kv_layout: str,
    ) -> None: ...

    def rmsnorm(self, input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def fused_add_rmsnorm(
        self, input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None: ...

    def silu_and_mul(self, input: torch.Tensor) -> torch.Tensor: ...

    def apply_rope_with_cos_sin_cache_inplace(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        head_size: int,
        cos_sin_cache: torch.Tensor,
        is_neox: bool,
    ) -> None: ...

    def top_k(
        self, input: torch.Tensor, k: int, *, sorted: bool = False, deterministic: bool = False, tie_break: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def load() -> FlashInfer:
    """The package.  Raises ModelError with what to do where it is not installed, or may not keep what it compiles.  That
    its kernels compile shows at the first step, which takes minutes the first time on a machine."""
    try:
        return cast(FlashInfer, importlib.import_module("flashinfer"))
    except ImportError as e:
        raise ModelError(
            f"a CUDA device needs FlashInfer ({e}); run `pip install kvferry[gpu]`, or use --kernels torch or --device cpu"
        ) from e
    except OSError as e:
        raise ModelError(
            f"FlashInfer finds no place for the kernels that it compiles ({e}); let HOME be a folder that may be "
            "written, or name one by FLASHINFER_WORKSPACE_BASE"
        ) from e


def why_not(head_dim: int, dtype: str) -> str | None:
    """What the kernels lack for a model, None when nothing."""
    if dtype not in DTYPES:
        return f"FlashInfer has no {dtype}; use --dtype {' or '.join(DTYPES)}"
    if head_dim not in HEAD_DIMS:
        return f"heads of {head_dim} dimensions: FlashInfer takes {', '.join(map(str, HEAD_DIMS))}"
    return None
