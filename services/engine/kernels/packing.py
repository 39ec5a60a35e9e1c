"""Weights in the order in which the kernels read them: see matmul.h."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from services.engine.kernels.library import load
from services.engine.kernels.packed import PackedLayer, PackedMatrix, PackedWeights
from services.engine.model_config import ModelConfig
from services.engine.rope import inverse_frequencies
from services.engine.weights import LayerWeights, Weights

_PANEL = 32  # outputs
_GROUP = 32  # inputs that share a scale and a base
_AT_ONCE = 8  # inputs that INT4 has side by side, in pairs
_LEAST_SCALE, _LEAST_NORMAL = 2.0**-24, 2.0**-14  # float16's; the kernels want no scale that is zero
_QUANTIZED_AT_ONCE = 1 << 20  # weights: what is worked in stays in the cache, and small
_ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_READ_AS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
_ALIGNMENT = 64


def pack(config: ModelConfig, weights: Weights, dtype: str) -> PackedWeights:
    """All at once; see ``pack_stream``."""
    head = None if weights.head is weights.embedding else weights.head
    return pack_stream(config, dtype, weights.embedding, weights.layers, weights.norm, head)


def pack_stream(
    config: ModelConfig,
    dtype: str,
    embedding: torch.Tensor,
    layers: Iterable[LayerWeights],
    norm: torch.Tensor,
    head: torch.Tensor | None,
) -> PackedWeights:
    """Takes one layer at a time, so that no more than one lies in memory twice.  ``head`` None: tied to the embedding."""
    packer = _Packer(dtype, _memory_nbytes(config, dtype))
    packed_embedding = packer.pack(embedding)
    return PackedWeights(
        dtype=dtype,
        embedding=packed_embedding,
        layers=tuple(_pack_layer(packer, layer) for layer in layers),
        norm=norm.float(),
        head=packed_embedding if head is None else packer.pack(head),
        frequencies=inverse_frequencies(config),
    )


def _pack_layer(packer: _Packer, layer: LayerWeights) -> PackedLayer:
    bias = layer.qkv_bias
    return PackedLayer(
        attention_norm=layer.attention_norm.float(),
        qkv=packer.pack(layer.qkv),
        qkv_bias=None if bias is None else torch.nn.functional.pad(bias.float(), (0, -len(bias) % _PANEL)),
        output=packer.pack(layer.output),
        mlp_norm=layer.mlp_norm.float(),
        gate_up=packer.pack(layer.gate_up),
        down=packer.pack(layer.down),
    )


class _Packer:
    """Puts matrices behind each other into one anonymous mapping, which asks for large pages."""

    def __init__(self, dtype: str, nbytes: int) -> None:
        self._dtype = dtype
        self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._used = 0
        with contextlib.suppress(OSError):  # a kernel without them: small pages do
            self._memory.madvise(mmap.MADV_HUGEPAGE)

    def pack(self, weight: torch.Tensor) -> PackedMatrix:
        """weight: [outputs, inputs]."""
        rows, columns = weight.shape
        padded = weight.to(_READ_AS[self._dtype])
        if behind := -columns % _GROUP:  # with what leaves the last group's range as it is
            padded = torch.cat((padded, padded[:, -1:].expand(-1, behind)), dim=1)
        padded = torch.nn.functional.pad(padded, (0, 0, 0, -rows % _PANEL))
        num_rows, num_columns = padded.shape
        format, scales = self._dtype, None
        if self._dtype == "int8":
            format, padded, scales = _quantize(padded)
            scales = self._store(scales)
        if format == "int4":
            padded = _side_by_side(padded)
        panels = padded.view(num_rows // _PANEL, _PANEL, -1, 1 if format == "float32" else 2).permute(0, 2, 1, 3)
        return PackedMatrix(self._store(panels), scales, num_rows, num_columns, format)

    def _store(self, tensor: torch.Tensor) -> torch.Tensor:
        place = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
        self._used += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        place.view(tensor.shape).copy_(tensor)
        return place


def _quantize(weight: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A format, values as ``weight``, [outputs, inputs], and scales and bases in the order of panels.  int4 where the
    weights of each group lie on 16 equal steps, as in files that were quantized so."""
    num_rows, num_columns = weight.shape
    found = torch.empty(num_rows, num_columns // _GROUP, 3)
    load().kvf_count_steps(weight.data_ptr(), found[..., 0].numel(), found.data_ptr())
    form = _INT4 if _Steps(*found.unbind(-1)).fit(_INT4) else _INT8
    values = torch.empty(weight.shape, dtype=torch.int8)
    pairs = torch.empty(num_rows, num_columns // _GROUP, 2, dtype=torch.int16)
    at_once = max(1, _QUANTIZED_AT_ONCE // num_columns)
    for begin in range(0, num_rows, at_once):
        rows = slice(begin, begin + at_once)
        groups = weight[rows].view(-1, num_columns // _GROUP, _GROUP)
        own, pairs[rows] = _quantize_groups(groups, _Steps(*found[rows].unbind(-1)), form)
        values[rows] = own.view(-1, num_columns)
    return form.format, values, pairs.view(num_rows // _PANEL, _PANEL, -1, 2).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class _Form:
    """``parts`` of a step that a base counts in; what q may be, from 0 to ``greatest``, and how far from zero a weight may
    be, in steps: so a weight is at most 2047 parts."""

    format: str
    parts: int
    greatest: int
    reach: float


_INT8, _INT4 = _Form("int8", 8, 255, 255.0), _Form("int4", 128, 15, 15.9)


@dataclass(frozen=True)
class _Steps:
    """What kvf_count_steps finds of groups: the least weight, how far the greatest is above it, and the number of equal
    steps between them, 0 where they are the same."""

    least: torch.Tensor
    span: torch.Tensor
    count: torch.Tensor

    @property
    def farthest(self) -> torch.Tensor:
        return torch.maximum(self.least.abs(), (self.least + self.span).abs())

    @property
    def size(self) -> torch.Tensor:
        return torch.where(self.count > 0, self.span / self.count, self.least.abs())

    def fit(self, form: _Form) -> bool:
        """NaN does not."""
        return bool(((self.count <= form.greatest) & (self.farthest <= form.reach * self.size)).all())


def _quantize_groups(groups: torch.Tensor, steps: _Steps, form: _Form) -> tuple[torch.Tensor, torch.Tensor]:
    """groups [..., 32] as scale * (q + base / parts), q from 0: int8, for int8 less 128, and int16 [..., 2], scales
    (float16, by their bits) and bases."""
    size = torch.maximum(steps.size, steps.farthest / form.reach).clamp_min(_LEAST_SCALE)
    # Steps are halved as often as all are still there: so bases, parts of a step, are finer.
    room = form.greatest / torch.maximum(steps.count, steps.farthest / size).clamp_min(1)
    halved = torch.minimum(room, size / _LEAST_NORMAL).clamp_min(1).log2().floor()
    size = size / halved.exp2()
    scales = size.half().abs()  # of NaN too: the kernels add to its bits
    too_small = scales.float() < size * (1 - 2**-10)  # where float16 has few digits
    scales = torch.where(too_small, _next(scales), scales)
    size = scales.float()
    bases = (steps.least / size * form.parts).round()
    values = ((groups - (bases * size / form.parts)[..., None]) / size[..., None]).round().clamp(0, form.greatest)
    if form is _INT8:
        values, bases = values - 128, bases + 128 * form.parts
    return values.to(torch.int8), torch.stack((scales.view(torch.int16), bases.to(torch.int16)), dim=-1)


def _next(scales: torch.Tensor) -> torch.Tensor:
    """The least greater float16 of each."""
    return (scales.view(torch.int16) + 1).view(torch.float16)


def _side_by_side(values: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] below 16 as int16 [outputs, inputs / 4], four in each: those of the same side of four pairs."""
    fours = values.view(len(values), -1, _AT_ONCE // 2, 2).to(torch.int16)
    return (fours << (4 * torch.arange(_AT_ONCE // 2, dtype=torch.int16))[:, None]).sum(2, dtype=torch.int16)


def _memory_nbytes(config: ModelConfig, dtype: str) -> int:
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = ((query_size + 2 * kv_size, hidden), (hidden, query_size), (2 * inner, hidden), (hidden, inner))
    shapes = [*layer * config.num_layers, *[(config.vocab_size, hidden)] * (1 if config.tied_embeddings else 2)]

    def nbytes(rows: int, columns: int) -> int:
        count = -(-rows // _PANEL) * _PANEL * (-(-columns // _GROUP) * _GROUP)
        scales = count // _GROUP * 2 * 2 if dtype == "int8" else 0
        return count * _ITEM_NBYTES[dtype] + scales + 2 * _ALIGNMENT

    return sum(nbytes(*shape) for shape in shapes)
