"""Weights in the order in which the kernels read them: see matmul.h."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable

import torch

from services.engine.kernels.library import load
from services.engine.kernels.packed import PackedLayer, PackedMatrix, PackedWeights
from services.engine.model_config import ModelConfig
from services.engine.rope import inverse_frequencies
from services.engine.weights import LayerWeights, Weights

_PANEL = 32  # outputs
_GROUP = 32  # inputs that share a scale and an offset
_LEAST, _GREATEST = -128, 127
_LEAST_SCALE = 2.0**-24  # float16's; the kernels want none that is zero
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
        scales = None
        if self._dtype == "int8":
            padded, scales = _quantize(padded)
        panels = padded.view(num_rows // _PANEL, _PANEL, -1, 1 if self._dtype == "float32" else 2).permute(0, 2, 1, 3)
        return PackedMatrix(self._store(panels), None if scales is None else self._store(scales), num_rows, num_columns)

    def _store(self, tensor: torch.Tensor) -> torch.Tensor:
        place = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
        self._used += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        place.view(tensor.shape).copy_(tensor)
        return place


def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values as ``weight``, [outputs, inputs], and scales and offsets in the order of panels."""
    num_rows, num_columns = weight.shape
    values = torch.empty(weight.shape, dtype=torch.int8)
    pairs = torch.empty(num_rows, num_columns // _GROUP, 2, dtype=torch.float16)
    at_once = max(1, _QUANTIZED_AT_ONCE // num_columns)
    for begin in range(0, num_rows, at_once):
        rows = slice(begin, begin + at_once)
        own, pairs[rows] = _quantize_groups(weight[rows].view(-1, num_columns // _GROUP, _GROUP))
        values[rows] = own.view(-1, num_columns)
    return values, pairs.view(num_rows // _PANEL, _PANEL, -1, 2).permute(0, 2, 3, 1)


def _quantize_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """groups [..., 32] as scale * q + offset: q int8, and float16 [..., 2]."""
    found = torch.empty(*groups.shape[:-1], 3)
    load().kvf_count_steps(groups.data_ptr(), found[..., 0].numel(), found.data_ptr())
    least, span, num_steps = found.unbind(-1)
    scales = torch.where(num_steps > 0, span / num_steps, least.abs()).half().clamp_min(_LEAST_SCALE)
    steps = scales.float()
    # q is 0 at the value nearest to zero: the offset, what is left of it, is then small, and float16 keeps all that
    # matters.  Files that have their least value in float16 (Q4_1) are met to the last bit.
    below = (-least / steps).round().clamp_max(-_LEAST).maximum(num_steps - _GREATEST)
    below = below.where((least.half() != least) | (num_steps > _GREATEST), 0.0)
    offsets = (least + below * steps).half()
    values = ((groups - offsets.float()[..., None]) / steps[..., None]).round().clamp(_LEAST, _GREATEST)
    return values.to(torch.int8), torch.stack((scales, offsets), dim=-1)


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
