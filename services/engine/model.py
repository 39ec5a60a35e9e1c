"""The forward pass of the Llama family, over the tokens of many sequences at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from services.engine.attention.base import AttentionPlan
from services.engine.model_config import ModelConfig
from services.engine.operations.base import Operations, Rotation
from services.engine.parallel.group import ALONE, Group
from services.engine.weights import LayerWeights, Weights


@dataclass(frozen=True, slots=True)
class Inputs:
    """A step's tokens, on the model's device.  token_ids, positions: [T].  ``rows``: of which of them logits are wanted;
    None is all, in order."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor | None


class LlamaModel:
    """Holds weights only; all state of a sequence is in the KV pool.  Computes in the weights' type with norms in float32,
    where the weights are.  Of a rank, ``config``, weights and pool are those of its shard; all of the ``group`` compute the
    same steps in the same order."""

    def __init__(self, config: ModelConfig, weights: Weights, operations: Operations, group: Group = ALONE) -> None:
        self.config = config
        self.weights = weights
        self._operations = operations
        self._group = group

    def forward(self, inputs: Inputs, kv_arena: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Writes the new tokens' KV into ``kv_arena`` ([num_blocks, layers, 2, block_size, kv_heads, head_dim]) and returns
        logits, [rows, vocab] in the weights' type.  Without a word to the host: a CUDA graph can hold it."""
        operations, weights = self._operations, self.weights
        rotation = operations.rotation(inputs.positions)
        hidden = functional.embedding(inputs.token_ids, weights.embedding)
        normalized = operations.normalize(hidden, weights.layers[0].attention_norm)
        next_norms = [layer.attention_norm for layer in weights.layers[1:]] + [weights.norm]
        for number, (layer, next_norm) in enumerate(zip(weights.layers, next_norms, strict=True)):
            attended = self._attend(layer, normalized, rotation, kv_arena[:, number], plan)
            hidden, normalized = operations.add_and_normalize(hidden, attended, layer.mlp_norm)
            transformed = self._transform(layer, normalized)
            hidden, normalized = operations.add_and_normalize(hidden, transformed, next_norm)
        wanted = normalized if inputs.rows is None else normalized[inputs.rows]
        return self._group.join(functional.linear(wanted, weights.head), self.config.vocab_size)

    def _attend(self, layer: LayerWeights, normalized: torch.Tensor, rotation: Rotation, kv_layer: torch.Tensor,
                plan: AttentionPlan) -> torch.Tensor:  # fmt: skip
        config = self.config
        qkv = functional.linear(normalized, layer.qkv, layer.qkv_bias)
        heads = qkv.view(len(qkv), -1, config.head_dim)
        query, key, value = heads.split_with_sizes((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        query, key = rotation(query, key)
        plan.append(key, value, kv_layer)
        return self._group.sum(functional.linear(plan.run(query, kv_layer).reshape(len(qkv), -1), layer.output))

    def _transform(self, layer: LayerWeights, normalized: torch.Tensor) -> torch.Tensor:
        gated = self._operations.gate(functional.linear(normalized, layer.gate_up))
        return self._group.sum(functional.linear(gated, layer.down))
