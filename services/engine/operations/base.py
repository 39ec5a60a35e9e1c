"""The seam between the model and what computes a layer's parts other than products and attention."""

from __future__ import annotations

from typing import Protocol

import torch


class Rotation(Protocol):
    def __call__(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embedding of queries, [T, heads, head_dim], and keys.  May change both."""


class Operations(Protocol):
    """Tensors are in the weights' type; norms are computed in float32.  What is said to be changed is the caller's no
    more."""

    def normalize(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm of each row of ``hidden``, [T, size]."""

    def add_and_normalize(
        self, hidden: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of ``hidden`` and ``addend``, and that normalized.  May change both."""

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """For tokens at ``positions``, [T]: once per step."""

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu of the first half of each row, times its second half."""
