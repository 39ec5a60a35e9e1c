"""The seam between the model and whatever computes attention over paged KV."""

from __future__ import annotations

from typing import Protocol

import torch

from services.engine.batch import Batch


class AttentionPlan(Protocol):
    """What a step's attention needs beyond queries and KV: the same for all layers.

    ``kv_layer`` is one layer's view of the pool, [num_blocks, 2, block_size, kv_heads, head_dim], dense in its last three
    dimensions and of any stride in the others."""

    def append(self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor) -> None:
        """Stores the new tokens' keys, rotated, and values, each [T, kv_heads, head_dim], in their slots."""

    def run(self, queries: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
        """Causal attention of each new token over its sequence so far, itself included.

        queries: [T, heads, head_dim], rotated; the new tokens' keys and values are appended already.  Heads share KV heads
        in order: the first heads / kv_heads of them the first KV head, and so on.  Returns [T, heads, head_dim].
        Nothing outside the sequences' tokens may influence the result: other slots hold anything, NaN included.
        """


class Attention(Protocol):
    def plan(self, batch: Batch) -> AttentionPlan:
        """Once per step, before the first layer.  A plan is of use until the next one is made."""
