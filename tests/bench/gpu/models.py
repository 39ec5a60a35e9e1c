"""A model's shape as a folder that workers serve: random weights, and words that are their numbers."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from services.engine.model_config import ModelConfig
from tests.bench.gpu.floors import weights_nbytes
from tests.bench.gpu.steps import random_matrix

_SPARE = 1.05


@contextmanager
def saved(config: ModelConfig, place: torch.device) -> Iterator[Path]:
    """The folder, for as long as the context: 16 GB of an 8B model, in the place for temporary files (TMPDIR).  All layers
    hold the same numbers, made once on ``place``, so that it takes as long as writing does; on a device each layer has
    memory of its own all the same.  Raises OSError where there is no room."""
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-gpu-") as temporary:
        wanted, free = weights_nbytes(config) * _SPARE, shutil.disk_usage(temporary).free
        if free < wanted:
            raise OSError(
                f"{config.name} needs {wanted / 1e9:.0f} GB in {tempfile.gettempdir()}, which has {free / 1e9:.0f}; name "
                "another folder by TMPDIR"
            )
        folder = Path(temporary) / config.name
        folder.mkdir()
        _save_descriptions(config, folder)
        _save_weights(config, folder, place)
        yield folder


def _save_descriptions(config: ModelConfig, folder: Path) -> None:
    described = {
        "model_type": config.architecture,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"w{number}" for number in range(len(letters), config.vocab_size))]
    backend = tokenizers.Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


def _save_weights(config: ModelConfig, folder: Path, place: torch.device) -> None:
    files: dict[str, str] = {}

    def save(file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        save_file(dict(tensors), folder / file)
        files.update(dict.fromkeys(tensors, file))

    words = random_matrix(place, config.vocab_size, config.hidden_size).cpu()
    save("words.safetensors", {"model.embed_tokens.weight": words, "model.norm.weight": torch.ones_like(words[0])})
    if not config.tied_embeddings:
        save("head.safetensors", {"lm_head.weight": words})
    layer = {name: tensor.cpu() for name, tensor in _layer(config, place).items()}
    for number in range(config.num_layers):
        named = {f"model.layers.{number}.{name}.weight": tensor for name, tensor in layer.items()}
        save(f"layer-{number:02}.safetensors", named)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}), encoding="utf-8")


def _layer(config: ModelConfig, place: torch.device) -> dict[str, torch.Tensor]:
    hidden, inner = config.hidden_size, config.intermediate_size
    size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (size, hidden), "self_attn.k_proj": (kv_size, hidden), "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, size), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    norms = {name: torch.ones(hidden, dtype=torch.bfloat16) for name in ("input_layernorm", "post_attention_layernorm")}
    return {**{name: random_matrix(place, *shape) for name, shape in shapes.items()}, **norms}
