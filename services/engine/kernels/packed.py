"""Weights in the form that the kernels read.  No torch: a worker whose weights lie in the cache never needs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}


class Numbers(Protocol):
    """Numbers in memory, one behind the other; a torch.Tensor is such."""

    @property
    def nbytes(self) -> int: ...

    def data_ptr(self) -> int:
        """The address; good for as long as this object."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A projection of ``num_rows`` outputs, padded with zeros, and ``num_columns`` inputs, padded with the last one: there
    inputs are zero.  ``scales`` is int8's alone: float16 [panels, inputs / 32, 2, 32], a group's scales, then its
    offsets."""

    values: Numbers
    scales: Numbers | None
    num_rows: int
    num_columns: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (self.scales.nbytes if self.scales is not None else 0)


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """Norms and biases are float32."""

    attention_norm: Numbers
    qkv: PackedMatrix
    qkv_bias: Numbers | None
    output: PackedMatrix
    mlp_norm: Numbers
    gate_up: PackedMatrix
    down: PackedMatrix


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """``head`` is ``embedding`` itself where the model ties them.  ``dtype``: "float32", "bfloat16" or "int8".
    ``frequencies``: [head_dim / 2], radians per position."""

    dtype: str
    embedding: PackedMatrix
    layers: tuple[PackedLayer, ...]
    norm: Numbers
    head: PackedMatrix
    frequencies: Numbers

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices())

    def matrices(self) -> list[PackedMatrix]:
        """Each once, always in the same order."""
        outer = [self.embedding] if self.head is self.embedding else [self.embedding, self.head]
        return outer + [m for layer in self.layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)]

    def parts(self) -> Iterator[Numbers]:
        """Everything once, always in the same order."""
        yield self.norm
        yield self.frequencies
        for layer in self.layers:
            yield layer.attention_norm
            yield layer.mlp_norm
            if layer.qkv_bias is not None:
                yield layer.qkv_bias
        for matrix in self.matrices():
            yield matrix.values
            if matrix.scales is not None:
                yield matrix.scales
