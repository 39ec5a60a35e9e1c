"""What a step has to compute and to move, counted from shapes, and how that compares with what a machine can do.  Pure.

FLOPs are those of the matrix products, two to a multiplication with addition: projections, scores, weighted values and the
output head.  Norms, rotations and softmax are left out.  Bytes are the least that a step can do with: every
weight once, however many rows share it; every KV block of a sequence once; what new tokens leave there once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from services.engine.layout import ITEM_NBYTES
from services.engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelShape:
    """``weight_nbytes``: of one weight of the layers, ``head_weight_nbytes``: of the head and of the embedding;
    ``kv_nbytes``: of one number of a key or value.  ``window``: see ``sliding_window`` of ``ModelConfig``."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    window: int | None
    weight_nbytes: float
    head_weight_nbytes: float
    kv_nbytes: int

    @staticmethod
    def of(config: ModelConfig, weight_nbytes: tuple[float, float], kv_dtype: str) -> ModelShape:
        """``weight_nbytes``: of the layers and of the head; ``kv_dtype``: one of a KV layout's types."""
        return ModelShape(
            config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
            config.intermediate_size, config.vocab_size, config.sliding_window,
            *weight_nbytes, ITEM_NBYTES[kv_dtype],
        )  # fmt: skip

    @property
    def num_body_weights(self) -> int:
        """That every new token is multiplied with: projections of all layers."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def num_head_weights(self) -> int:
        """That every place is multiplied with for which a token is drawn."""
        return self.hidden_size * self.vocab_size

    @property
    def kv_token_nbytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_nbytes


class Piece(NamedTuple):
    """One sequence's part of a step: ``num_new`` tokens are computed, the last of them at position ``context - 1``, and
    logits are needed for ``num_samples`` places."""

    num_new: int
    context: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class Demand:
    """FLOPs, and bytes between memory and processor."""

    flops: float = 0.0
    weight_bytes: float = 0.0
    kv_read_bytes: float = 0.0
    kv_written_bytes: float = 0.0

    @property
    def nbytes(self) -> float:
        return self.weight_bytes + self.kv_read_bytes + self.kv_written_bytes

    @property
    def intensity(self) -> float:
        """FLOP/byte; 0 of nothing."""
        return self.flops / self.nbytes if self.nbytes else 0.0

    def __add__(self, other: Demand) -> Demand:
        return Demand(
            self.flops + other.flops, self.weight_bytes + other.weight_bytes,
            self.kv_read_bytes + other.kv_read_bytes, self.kv_written_bytes + other.kv_written_bytes,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The most that a machine does.  0: not known."""

    flops_per_s: float = 0.0
    bytes_per_s: float = 0.0

    def seconds(self, demand: Demand) -> float:
        """The least that ``demand`` takes: the roofline.  As if a FLOP took a second where a ceiling is not known."""
        if not self.flops_per_s or not self.bytes_per_s:
            return demand.flops
        return max(demand.flops / self.flops_per_s, demand.nbytes / self.bytes_per_s)

    def mfu(self, flops_per_s: float) -> float:
        """Model FLOPs utilization: a share of the ceiling; 0 where that is not known."""
        return flops_per_s / self.flops_per_s if self.flops_per_s else 0.0

    def mbu(self, bytes_per_s: float) -> float:
        """Model bandwidth utilization, likewise."""
        return bytes_per_s / self.bytes_per_s if self.bytes_per_s else 0.0


def demand_of(shape: ModelShape, pieces: Iterable[Piece]) -> Demand:
    """Of a step of these pieces alone; nothing where there are none."""
    return split_demand(shape, pieces, ())[0]


def split_demand(shape: ModelShape, one: Iterable[Piece], other: Iterable[Piece]) -> tuple[Demand, Demand]:
    """Of the two parts of one step.  Weights are read for both at once: each bears them by its share of the rows."""
    counts = [_count(shape, pieces) for pieces in (one, other)]
    rows, samples = (sum(count[i] for count in counts) for i in (0, 1))
    first, second = (
        Demand(
            flops=2 * (num_rows * shape.num_body_weights + num_samples * shape.num_head_weights)
            + 4 * pairs * shape.num_layers * shape.num_heads * shape.head_dim,
            # A row of the embedding for each token besides.
            weight_bytes=shape.weight_nbytes * shape.num_body_weights * _share(num_rows, rows)
            + shape.head_weight_nbytes
            * (shape.num_head_weights * _share(num_samples, samples) + shape.hidden_size * num_rows),
            kv_read_bytes=seen * shape.kv_token_nbytes,
            kv_written_bytes=num_rows * shape.kv_token_nbytes,
        )
        for num_rows, num_samples, pairs, seen in counts
    )
    return first, second


def _count(shape: ModelShape, pieces: Iterable[Piece]) -> tuple[int, int, int, int]:
    """Rows, samples, pairs of a token and one that it attends to, and tokens whose KV is read."""
    rows = samples = pairs = seen = 0
    window = shape.window
    for num_new, context, num_samples in pieces:
        rows += num_new
        samples += num_samples
        start = context - num_new
        if window is None or context <= window:
            pairs += num_new * start + num_new * (num_new + 1) // 2
            seen += context
        else:
            growing = max(0, window - start)  # tokens that see all before them
            pairs += growing * start + growing * (growing + 1) // 2 + (num_new - growing) * window
            seen += min(context, window + num_new - 1)
    return rows, samples, pairs, seen


def _share(part: int, all_: int) -> float:
    return part / all_ if all_ else 0.0
