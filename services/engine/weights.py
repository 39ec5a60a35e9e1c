"""A model's weights, in the shapes the forward pass wants them.

Reads through one seam: a ``TensorSource`` gives any tensor by its Hugging Face name, in the layout of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import torch

from services.engine.gguf_weights import GgufTensors
from services.engine.model_config import ModelConfig, ModelError
from services.engine.safetensors_weights import SafetensorsTensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TensorSource(Protocol):
    def read(self, name: str) -> torch.Tensor:
        """Any floating dtype; valid until the next call.  Raises ModelError when there is none of that name."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Projections are ``[out, in]``.  ``qkv``: queries, keys and values below each other, ``gate_up``: gate above up,
    since one wide product runs faster than three or two narrow ones."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """``head`` is ``embedding`` itself where the model ties them."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor


def load_weights(
    config: ModelConfig, path: Path, dtype: str, progress: Callable[[float], None] | None = None
) -> Weights:
    """Reads the weights at ``path`` (a ``.gguf`` file or a Hugging Face directory) into memory as ``dtype``, one of
    ``DTYPES``.  Blocks; ``progress`` is called on this thread with the share that is done, 0 to 1.  Raises ModelError."""
    reader = WeightsReader(config, path, dtype)
    report = progress or (lambda _: None)
    report(0.0)
    embedding = reader.embedding()
    layers = []
    for layer in reader.layers():
        layers.append(layer)
        report(len(layers) / (config.num_layers + 1))
    norm, head = reader.norm(), reader.head()
    report(1.0)
    return Weights(embedding, tuple(layers), norm, embedding if head is None else head)


def weights_on(weights: Weights, place: torch.device) -> Weights:
    """Copies there, of tied weights one."""
    embedding = weights.embedding.to(place)
    layers = []
    for layer in weights.layers:
        parts = {field.name: getattr(layer, field.name) for field in fields(layer)}
        layers.append(replace(layer, **{name: part.to(place) for name, part in parts.items() if part is not None}))
    head = embedding if weights.head is weights.embedding else weights.head.to(place)
    return Weights(embedding, tuple(layers), weights.norm.to(place), head)


class WeightsReader:
    """Part by part, for whoever keeps them in another form."""

    def __init__(self, config: ModelConfig, path: Path, dtype: str) -> None:
        """As ``load_weights``.  Raises ModelError."""
        if dtype not in DTYPES:
            raise ModelError(f"the type {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
        source: TensorSource = GgufTensors(path, config) if path.is_file() else SafetensorsTensors(path)
        self._config = config
        self._reader = _Reader(source, DTYPES[dtype])

    def embedding(self) -> torch.Tensor:
        config = self._config
        return self._reader.stacked((config.hidden_size,), ("model.embed_tokens.weight", config.vocab_size))

    def layers(self) -> Iterator[LayerWeights]:
        for number in range(self._config.num_layers):
            yield _read_layer(self._reader, self._config, f"model.layers.{number}")

    def norm(self) -> torch.Tensor:
        return self._reader.stacked((), ("model.norm.weight", self._config.hidden_size))

    def head(self) -> torch.Tensor | None:
        """None where the model ties it to the embedding."""
        config = self._config
        if config.tied_embeddings:
            return None
        return self._reader.stacked((config.hidden_size,), ("lm_head.weight", config.vocab_size))


def _read_layer(reader: _Reader, config: ModelConfig, prefix: str) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = [(f"{prefix}.self_attn.{kind}_proj", size) for kind, size in
           (("q", query_size), ("k", kv_size), ("v", kv_size))]  # fmt: skip
    return LayerWeights(
        attention_norm=reader.stacked((), (f"{prefix}.input_layernorm.weight", hidden)),
        qkv=reader.stacked((hidden,), *((f"{name}.weight", size) for name, size in qkv)),
        qkv_bias=reader.stacked((), *((f"{name}.bias", size) for name, size in qkv)) if config.qkv_bias else None,
        output=reader.stacked((query_size,), (f"{prefix}.self_attn.o_proj.weight", hidden)),
        mlp_norm=reader.stacked((), (f"{prefix}.post_attention_layernorm.weight", hidden)),
        gate_up=reader.stacked(
            (hidden,), (f"{prefix}.mlp.gate_proj.weight", inner), (f"{prefix}.mlp.up_proj.weight", inner)
        ),
        down=reader.stacked((inner,), (f"{prefix}.mlp.down_proj.weight", hidden)),
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    source: TensorSource
    dtype: torch.dtype

    def stacked(self, row_shape: tuple[int, ...], *parts: tuple[str, int]) -> torch.Tensor:
        """The tensors named in ``parts``, each with its number of rows of ``row_shape``, below each other."""
        whole = torch.empty((sum(rows for _, rows in parts), *row_shape), dtype=self.dtype)
        begin = 0
        for name, rows in parts:
            tensor = self.source.read(name)
            if tensor.shape != (rows, *row_shape):
                raise ModelError(
                    f"the tensor {name} is {tuple(tensor.shape)} and should be {(rows, *row_shape)}; "
                    "the weights do not belong to this configuration"
                )
            whole[begin : begin + rows].copy_(tensor)
            begin += rows
        return whole
