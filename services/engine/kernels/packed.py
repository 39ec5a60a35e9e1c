"""Weights in the form that the kernels read.  No torch: a worker whose weights lie in the cache never needs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

DTYPES = ("float32", "bfloat16", "int8")  # of a model
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}  # of a matrix


class Numbers(Protocol):
    """Numbers in memory, one behind the other; a torch.Tensor is such."""

    @property
    def nbytes(self) -> int: ...

    def data_ptr(self) -> int:
        """The address; good for as long as this object."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A projection of ``num_rows`` outputs, padded with zeros, and ``num_columns`` inputs, padded with the last one: there
    inputs are zero.  ``format``: one of FORMATS.  ``scales``, of int8 and int4: [panels, inputs / 32, 2, 32], a group's
    scales, float16, then its bases, int16."""

    values: Numbers
    scales: Numbers | None
    num_rows: int
    num_columns: int
    format: str

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
    """``head`` is ``embedding`` itself where the model ties them.  ``dtype``: one of DTYPES; of int8, matrices may be int4.
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

    @property
    def weight_nbytes(self) -> tuple[float, float]:
        """Of one weight, scales included: of the layers, and of the head."""
        outer = 1 if self.head is self.embedding else 2
        return _mean_nbytes(self.matrices()[outer:]), _mean_nbytes([self.head])

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


def _mean_nbytes(matrices: list[PackedMatrix]) -> float:
    return sum(m.nbytes for m in matrices) / sum(m.num_rows * m.num_columns for m in matrices)
