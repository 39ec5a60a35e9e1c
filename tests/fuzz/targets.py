"""What reads them.  A target takes an input, or refuses it by an error that names it; anything else that it raises is a
finding."""

from __future__ import annotations

import asyncio
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message
from hypothesis import strategies as st

from gateway.http import schema
from gateway.http.app import create_app
from gateway.tenants import EVERYBODY
from gateway.validation import Validator
from kvferry import errors
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.inference.v1 import inference_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.bench.workload import read_conversations, read_trace
from services.decode.convert import to_writer
from services.directory.wire import to_change
from services.engine.checkpoint import DEFAULT_MODEL
from services.engine.gguf_file import GgufFile
from services.engine.hf_checkpoint import read_chat_template, read_config, read_special_tokens
from services.engine.layout import KvLayout
from services.engine.model_config import ModelError
from services.engine.model_files import open_model
from services.worker.convert import to_hashes, to_peer_layout, to_source
from tests.fuzz.inputs import INTEGERS, TEXTS, damaged, dumped, messages, nested, objects, values
from tests.gateway.scripted import MODEL, VOCABULARY, ScriptedFrontDoor, chunk, finished, started
from transport.descriptor import Descriptor
from transport.errors import BadDescriptor
from transport.segments import SegmentName

CHAT = {
    "model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0.5, "top_p": 0.5,
    "stop": ["x"], "stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2,
    "seed": 1, "n": 1, "user": "u", "presence_penalty": 0,
}  # fmt: skip
COMPLETION = {
    "model": MODEL,
    "prompt": [1, 2],
    "max_tokens": 3,
    "logprobs": 2,
    "echo": False,
    "best_of": 1,
    "suffix": None,
}
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4,
                     "original_max_position_embeddings": 8192},
    "eos_token_id": [1, 2], "bos_token_id": 1, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
LAYOUT = KvLayout(model_revision="r", dtype="float32", block_size=4, num_layers=2, num_kv_heads=2, head_dim=8)


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], None]


def _http(case: tuple[str, str, list[tuple[bytes, bytes]], bytes]) -> None:
    method, path, headers, body = case
    asyncio.run(_ask(method, path, headers, body))


async def _ask(method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    app = create_app(ScriptedFrontDoor(started(), chunk("abc"), finished()), vocabulary=VOCABULARY)
    status: list[int] = []
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.sleep(10)
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
        "raw_path": path.encode("utf-8", "replace"), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "state": {},
    }  # fmt: skip
    async with asyncio.timeout(20):
        await app(scope, receive, send)
    assert len(status) == 1, status
    assert status[0] < 500, status


def _body(case: tuple[type[schema.GenerationRequest], bytes]) -> None:
    kind, body = case
    with suppress(errors.InvalidRequestError):
        schema.parse(kind, body)


@cache
def _validator() -> Validator:
    return Validator.for_model(open_model(DEFAULT_MODEL))


def _generate(data: bytes | Message) -> None:
    with suppress(DecodeError, errors.InvalidRequestError, errors.NotFoundError):
        request = inference_pb2.GenerateRequest.FromString(data) if isinstance(data, bytes) else data
        asyncio.run(_validator().to_job(request, EVERYBODY))


def _block_event(data: bytes | Message) -> None:
    with suppress(DecodeError, errors.InvalidRequestError):
        to_change(directory_pb2.BlockEvent.FromString(data) if isinstance(data, bytes) else data)


def _worker(data: bytes | Message) -> None:
    with suppress(DecodeError, errors.InvalidRequestError, errors.ConflictError):
        request = worker_pb2.PrefillRequest.FromString(data) if isinstance(data, bytes) else data
        to_source(request.pull)
        to_hashes(request.cache_salt)
        to_peer_layout(request.ticket.layout, LAYOUT)


def _writer(data: bytes | Message) -> None:
    with suppress(DecodeError, errors.InvalidRequestError):
        to_writer(worker_pb2.Writer.FromString(data) if isinstance(data, bytes) else data)


def _descriptor(data: bytes) -> None:
    with suppress(BadDescriptor):
        assert Descriptor.unpack(data, backend="ucx").pack() == data


def _in_file(name: str, data: bytes, read: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        read(path)


def _gguf(data: bytes) -> None:
    def read(path: Path) -> None:
        with suppress(ModelError):
            file = GgufFile(path)
            for name in file.tensors:
                with suppress(ModelError):
                    file.floats(name)

    _in_file("model.gguf", data, read)


def _checkpoint(case: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for name, data in case.items():
            (directory / name).write_bytes(data)
        for read in (lambda d: read_config(d, "m"), read_chat_template, read_special_tokens):
            with suppress(ModelError):
                read(directory)


def _trace(suffix: str) -> Callable[[bytes], None]:
    def read(path: Path) -> None:
        with suppress(errors.InvalidRequestError):
            for ask in read_trace(path):
                assert 0 < ask.num_prompt_tokens < 1 << 31
                assert 0 < ask.num_output_tokens < 1 << 31
                assert abs(ask.at_s) < float("inf")

    return lambda data: _in_file(f"trace{suffix}", data, read)


def _conversations(data: bytes) -> None:
    def read(path: Path) -> None:
        with suppress(errors.InvalidRequestError):
            read_conversations(path)

    _in_file("talk.json", data, read)


def _gguf_bytes(fields: list[tuple[str, int, bytes]], tensors: list[tuple[str, list[int], int, int]]) -> bytes:
    def string(text: str) -> bytes:
        data = text.encode("utf-8", "replace")
        return struct.pack("<Q", len(data)) + data

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(string(key) + struct.pack("<I", kind) + value for key, kind, value in fields)
    for name, shape, kind, offset in tensors:
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(200)


def _safetensors_bytes(header: Any) -> bytes:
    data = dumped(header)
    return struct.pack("<Q", len(data)) + data + bytes(64)


_UINT64 = INTEGERS.map(lambda value: abs(value) % (1 << 64))
_GGUF = st.builds(
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
)  # fmt: skip
_ENTRY = objects({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]})
_SAFETENSORS = st.one_of(
    st.dictionaries(TEXTS, _ENTRY, max_size=3).map(_safetensors_bytes),
    values(["__metadata__", "data_offsets"]).map(_safetensors_bytes),
    st.just(struct.pack("<Q", 20_000) + nested(10_000)),
)
_HEADERS = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from([b"x-request-id", b"x-request-timeout", b"authorization", b"content-length", b"traceparent",
                             b"content-type", b"x-kvferry-timeline", b"cookie", b"host", b"accept"]),
            st.binary(min_size=1, max_size=12).map(bytes.lower),
        ),
        st.one_of(
            st.binary(max_size=30),
            st.sampled_from([b"nan", b"inf", b"-1", b"1e999", b"0", b"9" * 5000, b"Bearer", b"Bearer \xff",
                             b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01"]),
            st.floats().map(lambda x: str(x).encode()),
        ),
    ),
    max_size=5,
)  # fmt: skip
_CHAT_BODY = damaged(objects(CHAT).map(dumped))
_COMPLETION_BODY = damaged(objects(CHAT | COMPLETION).map(dumped))
_MOONCAKE = {"timestamp": 27, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
_CSV_CELL = st.one_of(
    INTEGERS.map(str), TEXTS, st.sampled_from(["2023-11-16 18:15:46.6805900", '"', "nan", "9" * 5000, "x" * 200_000])
)

TARGETS = [
    Target("http_request", st.tuples(
        st.sampled_from(["POST", "POST", "POST", "GET", "DELETE", "\x00"]),
        st.one_of(st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/v1/models/a/b"]),
                  st.text(max_size=20).map(lambda path: "/" + path)),
        _HEADERS, _CHAT_BODY), _http),
    Target("http_body", st.one_of(
        st.tuples(st.just(schema.ChatRequest), _CHAT_BODY),
        st.tuples(st.just(schema.CompletionRequest), _COMPLETION_BODY),
        st.tuples(st.just(schema.ChatRequest), st.integers(1, 5000).map(lambda n: b'{"messages": ' + nested(n) + b"}")),
    ), _body),
    Target("generate_request", st.one_of(
        messages(inference_pb2.GenerateRequest),
        damaged(messages(inference_pb2.GenerateRequest).map(lambda m: m.SerializeToString()))), _generate),
    Target("block_event", st.one_of(
        messages(directory_pb2.BlockEvent),
        damaged(messages(directory_pb2.BlockEvent).map(lambda m: m.SerializeToString()))), _block_event),
    Target("prefill_request", st.one_of(
        messages(worker_pb2.PrefillRequest),
        damaged(messages(worker_pb2.PrefillRequest).map(lambda m: m.SerializeToString()))), _worker),
    Target("writer", st.one_of(
        messages(worker_pb2.Writer),
        damaged(messages(worker_pb2.Writer).map(lambda m: m.SerializeToString()))), _writer),
    Target("descriptor", damaged(st.builds(
        lambda incarnation, base, nbytes, pid, address, key: Descriptor(
            "ucx", incarnation, base, nbytes, SegmentName(bytes(16), pid, 3) if pid else None, address, key).pack(),
        _UINT64, _UINT64, _UINT64, st.integers(0, 2**32 - 1), st.binary(max_size=30), st.binary(max_size=30))),
        _descriptor),
    Target("gguf", damaged(_GGUF), _gguf),
    Target("checkpoint", st.fixed_dictionaries({
        "config.json": st.one_of(damaged(objects(CONFIG).map(dumped)), st.just(dumped(CONFIG)), st.just(nested(10_000))),
        "model.safetensors": damaged(_SAFETENSORS),
    }, optional={
        "model.safetensors.index.json": damaged(
            objects({"weight_map": {"a": "model.safetensors", "b": "../x"}}).map(dumped)),
        "generation_config.json": damaged(objects({"eos_token_id": [1]}).map(dumped)),
        "tokenizer_config.json": damaged(
            objects({"chat_template": [{"name": "default", "template": "x"}], "bos_token": {"content": "a"}}).map(dumped)),
        "chat_template.jinja": st.binary(max_size=20),
    }), _checkpoint),
    Target("trace_jsonl", st.one_of(st.just(nested(10_000)), damaged(st.lists(objects(_MOONCAKE), max_size=4).map(
        lambda rows: b"\n".join(map(dumped, rows))))), _trace(".jsonl")),
    Target("trace_csv", damaged(st.lists(st.lists(_CSV_CELL, max_size=4), max_size=4).map(
        lambda rows: "\n".join(
            ["TIMESTAMP,ContextTokens,GeneratedTokens", *map(",".join, rows)]).encode(errors="replace"))),
        _trace(".csv")),
    Target("conversations", damaged(st.lists(objects(
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}), max_size=3).map(dumped)),
        _conversations),
]  # fmt: skip
