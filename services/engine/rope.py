"""Rotary position embeddings on half-split heads (https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import math

import torch

from services.engine.model_config import FrequencyFactors, LinearScaling, Llama3Scaling, ModelConfig, ModelError


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """[head_dim / 2] float32: radians per position, with the model's scaling applied."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearScaling(factor=factor):
            return frequencies / factor
        case FrequencyFactors(factors=factors):
            if len(factors) != len(frequencies):
                raise ModelError(f"the model {config.name!r} scales {len(factors)} of {len(frequencies)} frequencies")
            return frequencies / torch.tensor(factors)
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling)


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Appendix of https://arxiv.org/abs/2407.21783, and Meta's reference code."""
    turns = scaling.original_context_length * frequencies / (2 * math.pi)  # within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1.0 - blend) * frequencies / scaling.factor + blend * frequencies


def rotations(
    frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each [T, 1, head_dim / 2], for ``positions`` [T]; angles are computed in float32."""
    angles = positions[:, None].float() * frequencies
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """heads: [T, heads, head_dim]; the i-th number of each half make a pair."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
