"""Weights in the order in which the kernels read them: see matmul.h."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable

import torch

from services.engine.kernels.packed import PackedLayer, PackedMatrix, PackedWeights
from services.engine.model_config import ModelConfig
from services.engine.rope import inverse_frequencies
from services.engine.weights import LayerWeights, Weights

_PANEL = 32  # outputs
_GROUP = 64  # inputs that share a scale
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
        padded = torch.nn.functional.pad(weight.to(_READ_AS[self._dtype]), (0, -columns % _GROUP, 0, -rows % _PANEL))
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
    """Symmetric 8 bits, one scale to each group of inputs of an output; the scales in the order of panels."""
    num_rows, num_columns = weight.shape
    groups = weight.view(num_rows, num_columns // _GROUP, _GROUP)
    scales = groups.abs().amax(-1) / 127
    values = (groups / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round().to(torch.int8)
    return values.view(num_rows, num_columns), scales.view(num_rows // _PANEL, _PANEL, -1).transpose(1, 2).contiguous()


def _memory_nbytes(config: ModelConfig, dtype: str) -> int:
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = ((query_size + 2 * kv_size, hidden), (hidden, query_size), (2 * inner, hidden), (hidden, inner))
    shapes = [*layer * config.num_layers, *[(config.vocab_size, hidden)] * (1 if config.tied_embeddings else 2)]

    def nbytes(rows: int, columns: int) -> int:
        count = -(-rows // _PANEL) * _PANEL * (-(-columns // _GROUP) * _GROUP)
        scales = count // _GROUP * 4 if dtype == "int8" else 0
        return count * _ITEM_NBYTES[dtype] + scales + 2 * _ALIGNMENT

    return sum(nbytes(*shape) for shape in shapes)
