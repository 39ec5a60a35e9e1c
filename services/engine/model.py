"""The forward pass of the Llama family, over the tokens of many sequences at once."""

from __future__ import annotations

import torch
from torch.nn import functional

from services.engine.attention.base import Attention, AttentionPlan
from services.engine.batch import Batch
from services.engine.model_config import ModelConfig
from services.engine.rope import inverse_frequencies, rotate, rotations
from services.engine.weights import LayerWeights, Weights


class LlamaModel:
    """Holds weights only; all state of a sequence is in the KV pool.  Computes as Hugging Face transformers does, in the
    weights' type with norms in float32."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self._frequencies = inverse_frequencies(config)

    def forward(self, batch: Batch, kv_arena: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Writes the new tokens' KV into ``kv_arena`` ([num_blocks, layers, 2, block_size, kv_heads, head_dim]) and returns
        logits, [len(batch.samples), vocab] in the weights' type: one row for each token to draw."""
        block_size = kv_arena.shape[3]
        slots = torch.from_numpy(batch.slots)
        blocks, offsets = slots // block_size, slots % block_size
        hidden = functional.embedding(torch.from_numpy(batch.token_ids), self.weights.embedding)
        rotation = rotations(self._frequencies, torch.from_numpy(batch.positions), hidden.dtype)
        plan = attention.plan(batch)
        for number, layer in enumerate(self.weights.layers):
            kv_layer = kv_arena[:, number]
            hidden = hidden + self._attend(layer, hidden, rotation, kv_layer, (blocks, offsets), plan)
            hidden = hidden + self._transform(layer, hidden)
        sampled = hidden[torch.tensor([sample.row for sample in batch.samples], dtype=torch.long)]
        return functional.linear(self._norm(sampled, self.weights.norm), self.weights.head)

    def _attend(self, layer: LayerWeights, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor],
                kv_layer: torch.Tensor, slots: tuple[torch.Tensor, torch.Tensor], plan: AttentionPlan,
                ) -> torch.Tensor:  # fmt: skip
        config, (blocks, offsets) = self.config, slots
        qkv = functional.linear(self._norm(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
        heads = qkv.view(len(qkv), config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        num_rotated = config.num_heads + config.num_kv_heads
        rotated, value = rotate(heads[:, :num_rotated], *rotation), heads[:, num_rotated:]
        query, key = rotated[:, : config.num_heads], rotated[:, config.num_heads :]
        kv_layer[blocks, 0, offsets] = key
        kv_layer[blocks, 1, offsets] = value
        attended = plan.run(query, kv_layer)
        return functional.linear(attended.reshape(len(qkv), -1), layer.output)

    def _transform(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = functional.linear(self._norm(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, layer.down)

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.norm_eps)
        return weight * (wide * scale).to(hidden.dtype)
