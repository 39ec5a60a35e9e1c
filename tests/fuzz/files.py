"""What comes in files: checkpoints, traces, keys, settings."""

from __future__ import annotations

import atexit
import contextlib
import io
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from gateway.doorkeeper import read_keys
from gateway.tenants import KeyFileError
from kvferry import errors
from kvferry.bench.workload import read_conversations, read_trace
from services.directory.config import DirectoryConfig
from services.engine.gguf_checkpoint import read_config as read_gguf_config
from services.engine.gguf_file import GgufFile
from services.engine.gguf_tokenizer import read_tokenizer as read_gguf_tokenizer
from services.engine.hf_checkpoint import (
    read_chat_template,
    read_config,
    read_special_tokens,
    read_tokenizer,
    weight_files,
)  # fmt: skip
from services.engine.model_config import ModelError
from services.engine.safetensors_weights import SafetensorsTensors
from services.planner.hardware import DEFAULT_CATALOGUE, read_catalogue
from services.runtime.config import load
from tests.fuzz.inputs import INTEGERS, TEXTS, damaged, dumped, nested, objects, values
from tests.fuzz.mutation import json_lines, json_values, prefixed
from tests.fuzz.target import Target

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4,
                     "original_max_position_embeddings": 8192},
    "eos_token_id": [1, 2], "bos_token_id": 1, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [
        {"id": 3, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}],
    "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                          "use_regex": True},
    "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                                        "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
              "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}  # fmt: skip


@cache
def _folder() -> Path:
    """In memory where the system has it: files are written for each input."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="kvferry-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _safetensors_bytes(header: Any, data_nbytes: int = 64) -> bytes:
    data = dumped(header)
    return struct.pack("<Q", len(data)) + data + bytes(data_nbytes)


@cache
def _checkpoint() -> Path:
    """A whole one, of which each target damages one file."""
    path = _folder() / "checkpoint"
    path.mkdir()
    (path / "config.json").write_bytes(dumped(CONFIG))
    (path / "model.safetensors").write_bytes(_WHOLE_SAFETENSORS)
    (path / "tokenizer.json").write_bytes(dumped(TOKENIZER))
    return path


def _of_checkpoint(name: str, read: Callable[[Path], object]) -> Callable[[bytes], bool]:
    def read_with(data: bytes) -> bool:
        folder = _checkpoint()
        path = folder / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(data)
        try:
            read(folder)
            return True
        except ModelError:
            return False
        finally:
            if before is None:
                path.unlink()
            else:
                path.write_bytes(before)

    return read_with


def _tensors(folder: Path) -> None:
    read_config(folder, "m")
    tensors = SafetensorsTensors(folder)
    for name in (*tensors._file_of, "missing"):
        with contextlib.suppress(ModelError):
            tensors.read(name)


def _tokenizer(folder: Path) -> None:
    read_tokenizer(folder, read_config(folder, "m"))


def _templates(folder: Path) -> None:
    read_chat_template(folder)
    read_special_tokens(folder)


def _file(name: str, read: Callable[[Path], object], *refusals: type[BaseException]) -> Callable[[bytes], bool]:
    def read_with(data: bytes) -> bool:
        path = _folder() / name
        path.write_bytes(data)
        try:
            read(path)
        except refusals:
            return False
        return True

    return read_with


def _gguf(path: Path) -> None:
    file = GgufFile(path)
    for name in file.tensors:
        with contextlib.suppress(ModelError):
            file.floats(name)
    with contextlib.suppress(ModelError):
        config = read_gguf_config(file, "m")
        read_gguf_tokenizer(file, config)


def _trace(path: Path) -> None:
    for ask in read_trace(path):
        assert 0 < ask.num_prompt_tokens < 1 << 31
        assert 0 < ask.num_output_tokens < 1 << 31
        assert abs(ask.at_s) < float("inf")


def _settings(path: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            load(DirectoryConfig, ["--config", str(path)], "prog", {})
        except SystemExit:
            assert said.getvalue().startswith("prog: ")
            raise


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


def _gguf_bytes(fields: list[tuple[str, int, bytes]], tensors: list[tuple[str, list[int], int, int]]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(_string(key) + struct.pack("<I", kind) + value for key, kind, value in fields)
    for name, shape, kind, offset in tensors:
        head += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(200)


def _strings(*texts: str) -> bytes:
    return struct.pack("<IQ", 8, len(texts)) + b"".join(map(_string, texts))


_UINT64 = INTEGERS.map(lambda value: abs(value) % (1 << 64))
_WHOLE_GGUF = _gguf_bytes(
    [("general.architecture", 8, _string("llama")), ("general.alignment", 4, struct.pack("<I", 32)),
     *((f"llama.{name}", 4, struct.pack("<I", n)) for name, n in (
         ("embedding_length", 64), ("block_count", 2), ("attention.head_count", 4), ("attention.head_count_kv", 2),
         ("feed_forward_length", 128), ("context_length", 64), ("vocab_size", 4), ("rope.dimension_count", 16))),
     ("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
     ("tokenizer.ggml.model", 8, _string("gpt2")), ("tokenizer.ggml.pre", 8, _string("smollm")),
     ("tokenizer.ggml.tokens", 9, _strings("a", "b", "ab", "<s>")), ("tokenizer.ggml.merges", 9, _strings("a b")),
     ("tokenizer.ggml.token_type", 9, struct.pack("<IQ4i", 5, 4, 1, 1, 1, 3)),
     ("tokenizer.ggml.bos_token_id", 4, struct.pack("<I", 3)), ("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 3))],
    [("token_embd.weight", [2, 2], 0, 0), ("rope_freqs.weight", [8], 0, 32)],
)  # fmt: skip
_GGUF = st.one_of(st.just(_WHOLE_GGUF), st.builds(
    _gguf_bytes,
    st.lists(
        st.one_of(
            st.tuples(st.just("general.alignment"), st.just(4), st.integers(0, 64).map(lambda n: struct.pack("<I", n))),
            st.tuples(st.just("general.alignment"), st.just(11), INTEGERS.map(lambda n: struct.pack("<q", n % 2**62 - 5))),
            st.tuples(TEXTS, st.integers(0, 13), st.binary(max_size=16)),
            st.tuples(TEXTS, st.just(9), st.builds(lambda k, n: struct.pack("<IQ", k, n), st.integers(0, 12), _UINT64)),
        ),
        max_size=3,
    ),
    st.lists(st.tuples(TEXTS, st.lists(_UINT64, max_size=3), st.integers(0, 2), _UINT64), max_size=3),
))  # fmt: skip
_WHOLE_SAFETENSORS = _safetensors_bytes({"a": TENSOR}, 16)
_SAFETENSORS = st.one_of(
    st.just(_WHOLE_SAFETENSORS),
    st.dictionaries(TEXTS, st.one_of(st.just(TENSOR), objects(TENSOR)), max_size=3).map(_safetensors_bytes),
    values(["__metadata__", "data_offsets"]).map(_safetensors_bytes),
    st.just(struct.pack("<Q", 20_000) + nested(10_000)),
)
_MOONCAKE = {"timestamp": 27, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
_TALK = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
_CSV_CELL = st.one_of(
    INTEGERS.map(str), TEXTS, st.sampled_from(["2023-11-16 18:15:46.6805900", '"', "nan", "9" * 5000, "x" * 200_000])
)
_CSV = "TIMESTAMP,ContextTokens,GeneratedTokens"
_KEYS = (
    b'[[key]]\ntenant = "a"\nsha256 = "'
    + b"0f" * 32
    + b'"\n[tenant.a]\nweight = 2\nrequests_per_minute = 6\nmax_streams = 1\n'
)
_SETTINGS = b'listen = "127.0.0.1:1"\nhealth_port = 5\nlog_level = "info"\ninsecure = false\n'
_DEEP_TOML = st.sampled_from([b"a = " + nested(2000), b"[" + b"a." * 2000 + b"b]", b"a = " + b"9" * 5000, b"a = 1e999",
                              b"a = 9999-12-31T23:59:60Z", b"a = {" + b"a={" * 500])  # fmt: skip


TARGETS = [
    Target("gguf", damaged(_GGUF), _file("model.gguf", _gguf, ModelError)),
    Target("config_json",
           st.one_of(damaged(st.one_of(st.just(CONFIG), objects(CONFIG)).map(dumped)), st.just(nested(10_000))),
           _of_checkpoint("config.json", lambda folder: read_config(folder, "m")), json_values),
    Target("generation_config", damaged(objects({"eos_token_id": [1]}).map(dumped)),
           _of_checkpoint("generation_config.json", lambda folder: read_config(folder, "m")), json_values),
    Target("safetensors", damaged(_SAFETENSORS), _of_checkpoint("model.safetensors", _tensors), prefixed(json_values)),
    Target("safetensors_index", damaged(
        st.one_of(st.just({"weight_map": {"a": "model.safetensors"}}),
                  objects({"weight_map": {"a": "model.safetensors", "b": "../x"}})).map(dumped)),
        _of_checkpoint("model.safetensors.index.json", weight_files), json_values),
    Target("tokenizer_json", damaged(st.just(dumped(TOKENIZER))),
           _of_checkpoint("tokenizer.json", _tokenizer), json_values),
    Target("tokenizer_config", damaged(
        objects({"chat_template": [{"name": "default", "template": "x"}], "bos_token": {"content": "a"}}).map(dumped)),
        _of_checkpoint("tokenizer_config.json", _templates), json_values),
    Target("trace_jsonl", st.one_of(st.just(nested(10_000)), damaged(
        st.lists(st.one_of(st.just(_MOONCAKE), objects(_MOONCAKE)), max_size=4).map(
            lambda rows: b"\n".join(map(dumped, rows))))),
        _file("trace.jsonl", _trace, errors.InvalidRequestError), json_lines),
    Target("trace_csv", damaged(st.one_of(
        st.just(f"{_CSV}\n2023-11-16 18:15:46.6805900,374,44\n".encode()),
        st.lists(st.lists(_CSV_CELL, max_size=4), max_size=4).map(
            lambda rows: "\n".join([_CSV, *map(",".join, rows)]).encode(errors="replace")))),
        _file("trace.csv", _trace, errors.InvalidRequestError)),
    Target("conversations", damaged(
        st.lists(st.one_of(st.just(_TALK), objects(_TALK)), min_size=1, max_size=3).map(dumped)),
        _file("talk.json", read_conversations, errors.InvalidRequestError), json_values),
    Target("api_keys", st.one_of(damaged(st.just(_KEYS)), _DEEP_TOML), _file("keys.toml", read_keys, KeyFileError)),
    Target("settings", st.one_of(damaged(st.just(_SETTINGS)), _DEEP_TOML), _file("settings.toml", _settings, SystemExit)),
    Target("catalogue", st.one_of(damaged(st.just(DEFAULT_CATALOGUE.read_bytes())), _DEEP_TOML),
           _file("hardware.toml", read_catalogue, errors.InvalidRequestError)),
]  # fmt: skip
