"""A layer's small parts by FlashInfer's fused kernels.  Never run on a device; see flashinfer_attention.py."""

from __future__ import annotations

import torch

from services.engine.flashinfer_kernels import FlashInfer
from services.engine.model_config import ModelConfig
from services.engine.operations.base import Rotation
from services.engine.rope import inverse_frequencies

_ANGLE_ROWS = 8192  # of the table, made at once


class FlashInferOperations:
    def __init__(self, config: ModelConfig, kernels: FlashInfer, device: torch.device) -> None:
        """Cosines and sines of every position are kept on ``device``: 512 bytes each for heads of 128 dimensions."""
        self._config = config
        self._kernels = kernels
        self._rotations = _rotation_table(config, device)

    def normalize(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._kernels.rmsnorm(hidden, weight, self._config.norm_eps)

    def add_and_normalize(
        self, hidden: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # In place: its first argument becomes the norm, its second the sum.
        self._kernels.fused_add_rmsnorm(addend, hidden, weight, self._config.norm_eps)
        return hidden, addend

    def rotation(self, positions: torch.Tensor) -> Rotation:
        def rotate(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows = len(positions)  # views, which must not become copies: they are rotated in place
            self._kernels.apply_rope_with_cos_sin_cache_inplace(
                positions, query.view(rows, -1), key.view(rows, -1), self._config.head_dim, self._rotations, True
            )
            return query, key

        return rotate

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._kernels.silu_and_mul(gate_up)


def _rotation_table(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """[context_length, head_dim] float32: cosines, then sines.  The frequencies carry whatever scaling the model has."""
    frequencies = inverse_frequencies(config)
    table = torch.empty((config.context_length, config.head_dim), dtype=torch.float32, device=device)
    for first in range(0, config.context_length, _ANGLE_ROWS):
        positions = torch.arange(first, min(first + _ANGLE_ROWS, config.context_length), dtype=torch.float32)
        angles = positions[:, None] * frequencies
        table[first : first + _ANGLE_ROWS] = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return table
