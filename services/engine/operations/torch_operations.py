"""A layer's small parts in plain torch, as Hugging Face transformers computes them."""

from __future__ import annotations

import torch
from torch.nn import functional

from services.engine.model_config import ModelConfig
from services.engine.operations.base import Rotation
from services.engine.rope import inverse_frequencies, rotate, rotations


class TorchOperations:
    """On any device."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._eps = config.norm_eps
        self._frequencies = inverse_frequencies(config).to(device)
        self._dtype = dtype

    def normalize(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        return weight * (wide * scale).to(hidden.dtype)

    def add_and_normalize(
        self, hidden: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = hidden + addend
        return total, self.normalize(total, weight)

    def rotation(self, positions: torch.Tensor) -> Rotation:
        cos, sin = rotations(self._frequencies, positions, self._dtype)
        return lambda query, key: (rotate(query, cos, sin), rotate(key, cos, sin))

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
