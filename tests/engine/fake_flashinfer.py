"""FlashInfer's kernels in plain torch, on any device: what calls them runs in the tests, and gives the reference's tokens.

Refuses what the package refuses (types, lengths, a batch that does not fit its CUDA graph's buffers), and reads what is on
the device when it runs, not when it plans, as the kernels do.  What it plans with it copies there as the package does,
without waiting.  Types and head dimensions are left open, so that tests can be exact; on torch's meta device it computes
shapes.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

CUDA_CORE_GROUPS = (1, 2, 3, 4, 6, 8)


class _Paged:
    """What both wrappers have in common.  Buffers are the caller's with a CUDA graph, fresh ones otherwise."""

    device: torch.device
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor

    def _check_plan(self, indptr: torch.Tensor, indices: torch.Tensor, last: torch.Tensor, sizes: tuple[int, ...],
                    q_data_type: torch.dtype, kv_data_type: torch.dtype | None) -> None:  # fmt: skip
        for host in (indptr, last):
            assert host.device.type == "cpu", "planned on the host: a tensor of the device would be waited for"
        for tensor in (indptr, indices, last):
            assert tensor.dtype == torch.int32
            assert tensor.is_contiguous()
        assert indices.device == self.device, "a copy from the host would be waited for"
        assert len(indptr) == len(last) + 1
        assert int(indptr[-1]) == len(indices)
        assert (indptr.diff() > 0).all()
        assert int(last.min()) >= 1
        num_qo_heads, num_kv_heads, _, page_size = sizes
        assert int(last.max()) <= page_size
        assert num_qo_heads % num_kv_heads == 0
        self._sizes, self._dtypes = sizes, (q_data_type, kv_data_type or q_data_type)

    def _attend(self, q: torch.Tensor, cache: torch.Tensor, qo_indptr: list[int], window_left: int,
                out: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
        num_qo_heads, num_kv_heads, head_dim, page_size = self._sizes
        assert (q.dtype, cache.dtype) == self._dtypes
        assert q.shape == (qo_indptr[-1], num_qo_heads, head_dim)
        assert q.stride(-1) == cache.stride(-1) == 1
        assert cache.shape[1:] == (2, page_size, num_kv_heads, head_dim)
        out = torch.empty_like(q) if out is None else out
        if q.is_meta:
            return out
        indptr, last = self.indptr.tolist(), self.last_page_len.tolist()
        for number in range(len(last)):
            rows = slice(qo_indptr[number], qo_indptr[number + 1])
            pages = self.indices[indptr[number] : indptr[number + 1]].long()
            length = (len(pages) - 1) * page_size + last[number]
            key, value = (cache[pages, half].reshape(-1, num_kv_heads, head_dim)[:length] for half in (0, 1))
            out[rows] = dense(q[rows], key, value, window_left)
        return out


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window_left: int) -> torch.Tensor:
    """Causal attention of a sequence's last tokens over all of it, softmax in float32."""
    group = query.shape[1] // key.shape[1]
    key, value = (half.float().repeat_interleave(group, dim=1) for half in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) / math.sqrt(query.shape[-1])
    rows = torch.arange(len(key) - len(query), len(key))[:, None]
    columns = torch.arange(len(key))[None, :]
    hidden = columns > rows
    if window_left >= 0:
        hidden |= columns < rows - window_left
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), value).to(query.dtype)


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        assert kv_layout == "NHD"
        assert float_workspace_buffer.dtype == torch.uint8
        self.device = float_workspace_buffer.device

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
        causal: bool = False,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        sizes = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._check_plan(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, sizes, q_data_type, kv_data_type)
        assert causal
        assert qo_indptr.dtype == torch.int32
        assert len(qo_indptr) == len(paged_kv_indptr)
        assert int(qo_indptr[0]) == 0
        self.qo_indptr = qo_indptr.tolist()
        _, self.indptr, self.indices, self.last_page_len = (
            tensor.to(self.device, non_blocking=True)
            for tensor in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        )
        self.window_left = window_left

    def run(self, q: torch.Tensor, paged_kv_cache: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._attend(q, paged_kv_cache, self.qo_indptr, self.window_left, out)


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        assert kv_layout == "NHD"
        assert float_workspace_buffer.dtype == torch.uint8
        self.device = float_workspace_buffer.device
        self.use_cuda_graph, self.use_tensor_cores = use_cuda_graph, use_tensor_cores
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        if use_cuda_graph:
            assert all(buffer is not None for buffer in buffers)
            self.indptr, self.indices, self.last_page_len = buffers
            assert len(self.indptr) == len(self.last_page_len) + 1

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
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self._check_plan(indptr, indices, last_page_len, sizes, q_data_type, kv_data_type)
        assert self.use_tensor_cores or num_qo_heads // num_kv_heads in CUDA_CORE_GROUPS
        if self.use_cuda_graph:
            assert len(last_page_len) == len(self.last_page_len), "the batch size of a CUDA graph is fixed"
            self.indptr.copy_(indptr, non_blocking=True)
            self.last_page_len.copy_(last_page_len, non_blocking=True)
            self.indices[: len(indices)].copy_(indices, non_blocking=True)
            if not indices.is_meta:
                self.planned = [tensor.tolist() for tensor in (indptr, last_page_len, indices)]
        else:
            self.indptr, self.indices, self.last_page_len = (
                tensor.to(self.device, non_blocking=True) for tensor in (indptr, indices, last_page_len)
            )
        self.window_left = window_left

    def run(self, q: torch.Tensor, paged_kv_cache: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if self.use_cuda_graph and not q.is_meta:
            buffers = (self.indptr, self.last_page_len, self.indices[: int(self.indptr[-1])])
            assert [tensor.tolist() for tensor in buffers] == self.planned, "computed by a plan for another step"
        return self._attend(q, paged_kv_cache, list(range(len(q) + 1)), self.window_left, out)


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    assert kv_layout == "NHD"
    for tensor in (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len):
        assert tensor.dtype == torch.int32
        assert tensor.device == append_key.device
        assert tensor.is_contiguous()
    assert append_key.dtype == append_value.dtype == paged_kv_cache.dtype
    assert append_key.stride(-1) == append_value.stride(-1) == 1
    assert len(kv_indptr) == len(kv_last_page_len) + 1
    page_size = paged_kv_cache.shape[2]
    pages = kv_indices[kv_indptr[batch_indices.long()].long() + positions.long() // page_size].long()
    offsets = positions.long() % page_size
    paged_kv_cache[pages, 0, offsets] = append_key
    paged_kv_cache[pages, 1, offsets] = append_value


def rmsnorm(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    wide = input.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(input.dtype)


def fused_add_rmsnorm(input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> None:
    residual += input
    input.copy_(rmsnorm(residual, weight, eps))


def silu_and_mul(input: torch.Tensor) -> torch.Tensor:
    gate, up = input.chunk(2, dim=-1)
    return functional.silu(gate) * up


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    assert is_neox
    assert cos_sin_cache.dtype == torch.float32
    cos, sin = cos_sin_cache[positions.long()][:, None].chunk(2, dim=-1)
    for heads in (query.view(len(query), -1, head_size), key.view(len(key), -1, head_size)):
        first, second = heads.float().chunk(2, dim=-1)
        heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def top_k(
    input: torch.Tensor, k: int, sorted: bool = False, deterministic: bool = False, tie_break: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of equals at the edge the lower ids, in any order among themselves: here, to see who relies on one, by falling id."""
    assert deterministic
    assert tie_break == 1
    order = input.argsort(dim=-1, descending=True, stable=True)[:, :k]
    order = order.sort(dim=-1, descending=True).values
    values = input.gather(-1, order)
    if sorted:
        places = values.argsort(dim=-1, descending=True, stable=True)
        values, order = values.gather(-1, places), order.gather(-1, places)
    return values, order
