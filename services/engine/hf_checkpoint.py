"""What a Hugging Face directory says of its model.  No torch, and never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from services.engine.model_config import LinearScaling, Llama3Scaling, ModelConfig, ModelError, RopeScaling
from services.engine.tokenizer import Tokenizer

_ARCHITECTURES = ("llama", "mistral", "qwen2")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                 "chat_template.jinja")  # fmt: skip
_SAMPLE_NBYTES = 4096
_MAX_HEADER_NBYTES = 100 << 20


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files, in the order of their names; ModelError when there are none or one is missing."""
    if (directory / _INDEX).is_file():
        files = [directory / name for name in _indexed(directory / _INDEX)]
    else:
        files = [directory / _SINGLE]
    # Unlike Path.is_file it also says no to names that no file can have.
    missing = [ascii(file.name)[1:-1][:64] for file in files if not os.path.isfile(file)]
    if missing or not files:
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt*"))
        hint = "it has pickled weights only; convert them to safetensors" if pickled else "download the model again"
        raise ModelError(f"the model directory {directory} lacks {', '.join(missing) or _SINGLE}; {hint}")
    return files


def _indexed(path: Path) -> list[str]:
    """The files that an index names, which must lie beside it."""
    weight_map = _read_json(path).get("weight_map", {})
    names = set()
    for name in weight_map.values() if isinstance(weight_map, dict) else (None,):
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ModelError(f"{path} names {str(name)[:64]!r}, which is no file beside it; download it again")
        names.add(name)
    return sorted(names)


def read_config(directory: Path, name: str) -> ModelConfig:
    """Raises ModelError for what kvferry cannot compute exactly."""
    raw = _read_json(directory / "config.json")
    kind = raw.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ModelError(
            f"the model type {kind!r} of {directory} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    _refuse_unsupported(raw, directory)
    try:
        return _config(raw, directory, name)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ModelError(f"{directory / 'config.json'} lacks or misstates {error}") from error


def _config(raw: Mapping[str, Any], directory: Path, name: str) -> ModelConfig:
    generation = _read_json(directory / "generation_config.json", optional=True)
    num_heads = int(raw["num_attention_heads"])
    window = raw.get("sliding_window") if raw["model_type"] == "mistral" else None
    bos = raw.get("bos_token_id")
    rope = _rope(raw)
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    return ModelConfig(
        name=name,
        revision=_fingerprint(directory),
        architecture=raw["model_type"],
        hidden_size=int(raw["hidden_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // num_heads),
        intermediate_size=int(raw["intermediate_size"]),
        vocab_size=int(raw["vocab_size"]),
        context_length=int(raw["max_position_embeddings"]),
        norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope, raw, directory),
        sliding_window=None if window is None else int(window),
        qkv_bias=raw["model_type"] == "qwen2",
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        bos_token_id=None if bos is None else int(bos),
        eos_token_ids=tuple(sorted({int(e) for e in (eos if isinstance(eos, list) else [eos]) if e is not None})),
    )


def read_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"the model directory {directory} lacks tokenizer.json; download the model again")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:
        # The library raises nothing narrower than Exception, and what it panics with is not even one.
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ModelError(f"{path} cannot be read: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    return Tokenizer(backend, bos_id=config.bos_token_id, eos_ids=config.eos_token_ids)


def read_chat_template(directory: Path) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read: {error}; download it again") from error
    stated = _read_json(directory / "tokenizer_config.json", optional=True).get("chat_template")
    if isinstance(stated, list):  # several by name
        stated = next(
            (entry.get("template") for entry in stated if isinstance(entry, dict) and entry.get("name") == "default"),
            None,
        )
    return stated if isinstance(stated, str) else None


def read_special_tokens(directory: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and the like, as chat templates call them."""
    described = _read_json(directory / "tokenizer_config.json", optional=True)
    found = {}
    for kind in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = described.get(kind)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[kind] = token
    return found


def _refuse_unsupported(raw: Mapping[str, Any], directory: Path) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"the activation {raw['hidden_act']!r} of {directory} is not supported; silu is")
    if raw.get("quantization_config"):
        raise ModelError(f"the weights of {directory} are quantized in a way that is not supported; use the original")
    if raw.get("mlp_bias") or (raw["model_type"] != "qwen2" and raw.get("attention_bias")):
        raise ModelError(f"the model {directory} has biases outside query, key and value, which are not supported")
    if raw["model_type"] == "qwen2" and raw.get("use_sliding_window"):
        raise ModelError(f"the model {directory} has a sliding window on some layers only, which is not supported")


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings: ``rope_parameters`` with everything, or ``rope_theta`` beside ``rope_scaling``."""
    if isinstance(raw.get("rope_parameters"), dict):
        return dict(raw["rope_parameters"])
    return {"rope_theta": raw.get("rope_theta", 10000.0)} | dict(raw.get("rope_scaling") or {})


def _rope_scaling(rope: Mapping[str, Any], raw: Mapping[str, Any], directory: Path) -> RopeScaling | None:
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"the model {directory} rotates a part of each head only, which is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(float(rope["factor"]))
    if kind == "llama3":
        return Llama3Scaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_context_length=int(rope["original_max_position_embeddings"]),
        )
    raise ModelError(f"the rope scaling {kind!r} of {directory} is not supported; supported are linear and llama3")


def _fingerprint(directory: Path) -> str:
    """The descriptions, each weight file's header and size, and a sample from the start and the middle of every
    tensor."""
    digest = hashlib.sha256()
    for name in _DESCRIPTIONS:
        path = directory / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name}:{len(content)};".encode())
            digest.update(content)
    for path in weight_files(directory):
        nbytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_nbytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_NBYTES + 1
            if 8 + header_nbytes > min(nbytes, _MAX_HEADER_NBYTES):
                raise ModelError(f"{path} is damaged; download it again")
            header = file.read(header_nbytes)
            digest.update(f"{path.name}:{nbytes};".encode())
            digest.update(header)
            for begin, end in sorted(_tensor_ranges(header, path, nbytes - 8 - header_nbytes)):
                for offset in (begin, (begin + end) // 2):
                    file.seek(8 + header_nbytes + offset)
                    digest.update(file.read(min(_SAMPLE_NBYTES, end - offset)))
    return digest.hexdigest()


def _tensor_ranges(header: bytes, path: Path, data_nbytes: int) -> list[tuple[int, int]]:
    """Within a file that has ``data_nbytes`` behind its header."""
    try:
        tensors = json.loads(header)
        ranges = []
        for name, entry in tensors.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end <= data_nbytes):
                raise ValueError(f"the tensor {name} lies beyond the end")
            ranges.append((begin, end))
        return ranges
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged; download it again") from error


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}; download the model again") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no JSON; download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is no JSON object; download it again")
    return content
