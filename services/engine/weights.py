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
from services.engine.parallel.shard import Shard
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
    """``head`` is ``embedding`` itself where the model ties them; a rank's is the rows of its tokens."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor


def load_weights(
    config: ModelConfig, path: Path, dtype: str, progress: Callable[[float], None] | None = None,
    shard: Shard | None = None,
) -> Weights:  # fmt: skip
    """Reads the weights at ``path`` (a ``.gguf`` file or a Hugging Face directory) into memory as ``dtype``, one of
    ``DTYPES``, of one rank those of its ``shard``.  Blocks; ``progress`` is called on this thread with the share that is
    done, 0 to 1.  Raises ModelError."""
    shard = shard or Shard.whole(config)
    reader = WeightsReader(config, path, dtype, shard)
    report = progress or (lambda _: None)
    report(0.0)
    embedding = reader.embedding()
    layers = []
    for layer in reader.layers():
        layers.append(layer)
        report(len(layers) / (config.num_layers + 1))
    norm, head = reader.norm(), reader.head()
    report(1.0)
    if head is None:
        head = embedding if shard.size == 1 else embedding[shard.tokens.start : shard.tokens.stop]
    return Weights(embedding, tuple(layers), norm, head)


def weights_on(weights: Weights, place: torch.device) -> Weights:
    """Copies there, of tied weights one."""
    embedding = weights.embedding.to(place)
    layers = []
    for layer in weights.layers:
        parts = {field.name: getattr(layer, field.name) for field in fields(layer)}
        layers.append(replace(layer, **{name: part.to(place) for name, part in parts.items() if part is not None}))
    if weights.head is weights.embedding:
        head = embedding
    elif weights.head.untyped_storage().data_ptr() == weights.embedding.untyped_storage().data_ptr():  # rows of it
        first = weights.head.storage_offset() // weights.head.shape[1]
        head = embedding[first : first + len(weights.head)]
    else:
        head = weights.head.to(place)
    return Weights(embedding, tuple(layers), weights.norm.to(place), head)


class WeightsReader:
    """Part by part, for whoever keeps them in another form."""

    def __init__(self, config: ModelConfig, path: Path, dtype: str, shard: Shard | None = None) -> None:
        """As ``load_weights``.  Raises ModelError."""
        if dtype not in DTYPES:
            raise ModelError(f"the type {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
        source: TensorSource = GgufTensors(path, config) if path.is_file() else SafetensorsTensors(path)
        self._config = config
        self._shard = shard or Shard.whole(config)
        self._reader = _Reader(source, DTYPES[dtype])

    def embedding(self) -> torch.Tensor:
        """Whole on every rank: looking up reads a few rows, and sums over the ranks would cost one more."""
        config = self._config
        return self._reader.stacked((config.hidden_size,), Part("model.embed_tokens.weight", config.vocab_size))

    def layers(self) -> Iterator[LayerWeights]:
        for number in range(self._config.num_layers):
            yield _read_layer(self._reader, self._config, self._shard, f"model.layers.{number}")

    def norm(self) -> torch.Tensor:
        return self._reader.stacked((), Part("model.norm.weight", self._config.hidden_size))

    def head(self) -> torch.Tensor | None:
        """None where the model ties it to the embedding."""
        config = self._config
        if config.tied_embeddings:
            return None
        return self._reader.stacked(
            (config.hidden_size,), Part("lm_head.weight", config.vocab_size, self._shard.tokens)
        )


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a file, of ``num_rows`` rows, of which ``rows`` are wanted; None is all."""

    name: str
    num_rows: int
    rows: range | None = None


def _read_layer(reader: _Reader, config: ModelConfig, shard: Shard, prefix: str) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    queries, kv = (range(heads.start * config.head_dim, heads.stop * config.head_dim)
                   for heads in (shard.heads, shard.kv_heads))  # fmt: skip
    qkv = [(f"{prefix}.self_attn.{kind}_proj", size, rows) for kind, size, rows in
           (("q", query_size, queries), ("k", kv_size, kv), ("v", kv_size, kv))]  # fmt: skip
    biases = [Part(f"{name}.bias", size, rows) for name, size, rows in qkv]
    return LayerWeights(
        attention_norm=reader.stacked((), Part(f"{prefix}.input_layernorm.weight", hidden)),
        qkv=reader.stacked((hidden,), *(Part(f"{name}.weight", size, rows) for name, size, rows in qkv)),
        qkv_bias=reader.stacked((), *biases) if config.qkv_bias else None,
        output=reader.stacked((query_size,), Part(f"{prefix}.self_attn.o_proj.weight", hidden), columns=queries),
        mlp_norm=reader.stacked((), Part(f"{prefix}.post_attention_layernorm.weight", hidden)),
        gate_up=reader.stacked(
            (hidden,),
            *(Part(f"{prefix}.mlp.{kind}_proj.weight", inner, shard.inner) for kind in ("gate", "up")),
        ),
        down=reader.stacked((inner,), Part(f"{prefix}.mlp.down_proj.weight", hidden), columns=shard.inner),
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    source: TensorSource
    dtype: torch.dtype

    def stacked(self, row_shape: tuple[int, ...], *parts: Part, columns: range | None = None) -> torch.Tensor:
        """The rows that ``parts`` name, each of ``row_shape``, below each other; of ``columns`` alone where given."""
        wanted = [range(part.num_rows) if part.rows is None else part.rows for part in parts]
        kept = row_shape if columns is None else (len(columns),)
        whole = torch.empty((sum(map(len, wanted)), *kept), dtype=self.dtype)
        begin = 0
        for part, rows in zip(parts, wanted, strict=True):
            tensor = self.source.read(part.name)
            if tensor.shape != (part.num_rows, *row_shape):
                raise ModelError(
                    f"the tensor {part.name} is {tuple(tensor.shape)} and should be {(part.num_rows, *row_shape)}; "
                    "the weights do not belong to this configuration"
                )
            tensor = tensor[rows.start : rows.stop]
            if columns is not None:
                tensor = tensor[:, columns.start : columns.stop]
            whole[begin : begin + len(rows)].copy_(tensor)
            begin += len(rows)
        return whole
