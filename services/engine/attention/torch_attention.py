"""Paged attention in plain torch: blocks are gathered, then scaled_dot_product_attention does the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from services.engine.batch import Batch

_MAX_PADDING = 1.33
_CPU = torch.device("cpu")


class TorchAttention:
    """``sliding_window``: how many positions a token sees, itself included; None is all.  Stateless, so thread-safe."""

    def __init__(self, *, block_size: int, sliding_window: int | None, device: torch.device = _CPU) -> None:
        self._block_size = block_size
        self._window = sliding_window
        self._device = device

    def plan(self, batch: Batch) -> TorchPlan:
        sequences = [self._sequence(batch, i) for i in range(batch.num_sequences)]
        prefills = tuple(
            _Prefill(s.begin, s.end, torch.from_numpy(s.blocks).to(self._device), s.length, self._mask(s))
            for s in sequences
            if s.end - s.begin > 1
        )
        decodes = sorted((s for s in sequences if s.end - s.begin == 1), key=lambda s: len(s.blocks), reverse=True)
        groups: list[list[_Sequence]] = []
        for sequence in decodes:
            if groups and len(groups[-1][0].blocks) <= _MAX_PADDING * len(sequence.blocks):
                groups[-1].append(sequence)
            else:
                groups.append([sequence])
        blocks, offsets = (torch.from_numpy(a).to(self._device) for a in np.divmod(batch.slots, self._block_size))
        return TorchPlan(blocks, offsets, prefills, tuple(self._decode(group) for group in groups))

    def _sequence(self, batch: Batch, index: int) -> _Sequence:
        begin, end = int(batch.qo_indptr[index]), int(batch.qo_indptr[index + 1])
        blocks = batch.kv_indices[batch.kv_indptr[index] : batch.kv_indptr[index + 1]].astype(np.int64)
        length = (len(blocks) - 1) * self._block_size + int(batch.kv_last_page_len[index])
        first = length - (end - begin)
        num_skipped = 0
        if self._window is not None:  # blocks that not even the first new token sees
            num_skipped = max(0, first - self._window + 1) // self._block_size
        skipped_tokens = num_skipped * self._block_size
        return _Sequence(begin, end, blocks[num_skipped:], length - skipped_tokens, first - skipped_tokens)

    def _mask(self, sequence: _Sequence) -> torch.Tensor | None:
        """None where plain causality from the first gathered token on is all there is."""
        if sequence.first == 0 and (self._window is None or self._window >= sequence.length):
            return None
        rows = torch.arange(sequence.first, sequence.length, device=self._device)[:, None]
        columns = torch.arange(sequence.length, device=self._device)[None, :]
        mask = columns <= rows
        return mask if self._window is None else mask & (columns > rows - self._window)

    def _decode(self, group: list[_Sequence]) -> _Decode:
        """``group`` is sorted, longest first: the others are padded to its number of blocks with their own last one."""
        num_blocks = len(group[0].blocks)
        table = np.stack([np.pad(s.blocks, (0, num_blocks - len(s.blocks)), mode="edge") for s in group])
        positions = np.arange(num_blocks * self._block_size)
        lengths = np.array([s.length for s in group])[:, None]
        holds_token = positions < lengths
        seen = holds_token if self._window is None else holds_token & (positions >= lengths - self._window)
        return _Decode(
            rows=torch.tensor([s.begin for s in group], device=self._device),
            blocks=torch.from_numpy(table.reshape(-1)).to(self._device),
            foreign=torch.from_numpy(np.flatnonzero(~holds_token)).to(self._device),
            mask=None if seen.all() else torch.from_numpy(seen).to(self._device)[:, None, None, :],
        )


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Tokens begin..end of the batch; ``blocks`` to look at, holding ``length`` tokens, of which the first new one is at
    ``first``."""

    begin: int
    end: int
    blocks: np.ndarray[tuple[int], np.dtype[np.int64]]
    length: int
    first: int


@dataclass(frozen=True, slots=True)
class _Prefill:
    begin: int
    end: int
    blocks: torch.Tensor
    length: int
    mask: torch.Tensor | None

    def run(self, queries: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
        key, value = _gather(kv_layer, self.blocks)
        attended = functional.scaled_dot_product_attention(
            queries[self.begin : self.end].transpose(0, 1)[None],
            key[: self.length].transpose(0, 1)[None],
            value[: self.length].transpose(0, 1)[None],
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=True,
        )
        return attended[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _Decode:
    """Sequences of one new token each, computed at once.  ``foreign``: gathered slots that are no token of theirs."""

    rows: torch.Tensor
    blocks: torch.Tensor
    foreign: torch.Tensor
    mask: torch.Tensor | None

    def run(self, queries: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
        size, (num_kv_heads, head_dim) = len(self.rows), kv_layer.shape[3:]
        own = queries[self.rows]
        key, value = _gather(kv_layer, self.blocks)
        # A weight of zero times NaN is NaN, so masking alone would let a stale slot in.
        key.index_fill_(0, self.foreign, 0)
        value.index_fill_(0, self.foreign, 0)
        attended = functional.scaled_dot_product_attention(
            own.view(size, num_kv_heads, -1, head_dim),  # the heads that share a KV head, as if they were tokens
            key.view(size, -1, num_kv_heads, head_dim).transpose(1, 2),
            value.view(size, -1, num_kv_heads, head_dim).transpose(1, 2),
            attn_mask=self.mask,
        )
        return attended.reshape(own.shape)


@dataclass(frozen=True, slots=True)
class TorchPlan:
    blocks: torch.Tensor  # where each new token's KV goes
    offsets: torch.Tensor
    prefills: tuple[_Prefill, ...]
    decodes: tuple[_Decode, ...]

    def append(self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor) -> None:
        kv_layer[self.blocks, 0, self.offsets] = key
        kv_layer[self.blocks, 1, self.offsets] = value

    def run(self, queries: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
        attended = torch.empty_like(queries)
        for prefill in self.prefills:
            attended[prefill.begin : prefill.end] = prefill.run(queries, kv_layer)
        for decode in self.decodes:
            attended[decode.rows] = decode.run(queries, kv_layer)
        return attended


def _gather(kv_layer: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the blocks' keys and values, each [tokens, kv_heads, head_dim]."""
    num_blocks, _, _, num_kv_heads, head_dim = kv_layer.shape
    # As rows of one dimension, index_select copies whole blocks: ten times as fast as over five dimensions.
    rows = kv_layer.view(num_blocks, 2, -1)
    key, value = (rows[:, half].index_select(0, blocks).view(-1, num_kv_heads, head_dim) for half in (0, 1))
    return key, value
