"""Whatever is wrong with a request is said precisely, and harms nobody else."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
import openai
import pytest

from kvferry import Client, Error, InvalidRequestError, NotFoundError
from kvferry.api.inference.v1 import inference_pb2
from tests.integration.conftest import Running


@pytest.fixture(autouse=True)
def still_healthy(cluster: Running, client: Client) -> Any:
    yield
    assert client.health().name == "SERVING"
    assert len(client.generate("Still there?", max_tokens=2, temperature=0).result().token_ids) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"prompt": "word " * 9000}, InvalidRequestError, r"prompt: has \d+ tokens; the model's context holds 8192"),
        ({"prompt": ""}, InvalidRequestError, "empty"),
        ({"prompt": []}, InvalidRequestError, "empty"),
        ({"prompt": [1, 49152]}, InvalidRequestError, "49152"),
        ({"max_tokens": 0}, InvalidRequestError, "max_tokens: must be at least 1, not 0"),
        ({"max_tokens": -5}, InvalidRequestError, "-5"),
        ({"max_tokens": 9000}, InvalidRequestError, "room for"),
        ({"temperature": -0.1}, InvalidRequestError, "temperature"),
        ({"temperature": float("nan")}, InvalidRequestError, "temperature"),
        ({"temperature": float("inf")}, InvalidRequestError, "temperature"),
        ({"top_p": 0.0}, InvalidRequestError, "top_p"),
        ({"top_p": 1.5}, InvalidRequestError, "top_p"),
        ({"top_k": -1}, InvalidRequestError, "top_k"),
        ({"logprobs": 21}, InvalidRequestError, "num_logprobs"),
        ({"stop": [""]}, InvalidRequestError, "stop"),
        ({"stop": ["x"] * 17}, InvalidRequestError, "17"),
        ({"model": "gpt-7"}, NotFoundError, "gpt-7"),
        ({"request_id": "line\nbreak"}, InvalidRequestError, "request_id"),
    ],
)
def test_grpc(client: Client, arguments: dict[str, Any], error: type[Error], says: str) -> None:
    with pytest.raises(error, match=says):
        client.generate(arguments.pop("prompt", "Hello"), **arguments).result()


def test_a_prompt_that_is_too_long_has_a_reason_of_its_own(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("word " * 9000).result()
    assert (caught.value.reason, caught.value.metadata["field"]) == ("PROMPT_TOO_LONG", "prompt")


def test_bad_chats(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="role"):
        client.chat([{"role": "wizard", "content": "x"}]).result()
    with pytest.raises(InvalidRequestError, match="empty"):
        client.chat([]).result()


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff\xff\xff\xff",
        b"\x12\x03\xff\xfe\xfd",  # text that is not UTF-8
        inference_pb2.GenerateRequest(text="cut off").SerializeToString()[:-2],
    ],
)
def test_malformed_protobuf(cluster: Running, payload: bytes) -> None:
    with grpc.insecure_channel(cluster.address) as channel:
        call = channel.unary_stream("/kvferry.api.inference.v1.InferenceService/Generate")(payload, timeout=10)
        with pytest.raises(grpc.RpcError) as refused:
            list(call)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_grpc_message_of_twenty_megabytes(cluster: Running, client: Client) -> None:
    with pytest.raises(Error, match=r"(?i)larger than max|exceed|limit"):
        client.generate("x" * 20_000_000).result()


@pytest.mark.parametrize(
    ("body", "status", "names"),
    [
        (b"{", 400, "JSON"),
        (b'{"prompt": "\xff\xfe"}', 400, "UTF-8"),
        (b'{"model": "smollm2-135m-instruct", "prompt": "x", "colour": "blue"}', 400, "colour"),
        (b'{"model": "smollm2-135m-instruct", "prompt": "x", "max_tokens": 0}', 400, "max_tokens"),
        (b'{"model": "smollm2-135m-instruct", "prompt": "x", "temperature": -1}', 400, "temperature"),
        (b'{"model": "smollm2-135m-instruct", "prompt": "x", "temperature": "hot"}', 400, "temperature"),
        (b'{"model": "smollm2-135m-instruct", "prompt": ""}', 400, "prompt"),
        (b'{"model": "nope", "prompt": "x"}', 404, "nope"),
        (b'{"model": "smollm2-135m-instruct", "prompt": "' + b"word " * 9000 + b'"}', 400, "prompt_too_long"),
        (b'{"model": "smollm2-135m-instruct", "prompt": "' + b"x" * 10_000_000 + b'"}', 413, "large"),
    ],
)
def test_http(cluster: Running, body: bytes, status: int, names: str) -> None:
    response = httpx.post(
        f"{cluster.http_url}/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=60
    )
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert names.lower() in str(error).lower()


def test_the_official_openai_client(cluster: Running) -> None:
    client = openai.OpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list().data
    assert model.id == "smollm2-135m-instruct"
    whole = client.chat.completions.create(
        model=model.id, messages=[{"role": "user", "content": "Say hello."}], max_tokens=12, temperature=0
    )
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 12
    pieces = list(
        client.chat.completions.create(
            model=model.id, messages=[{"role": "user", "content": "Say hello."}], max_tokens=12, temperature=0,
            stream=True, stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    assert pieces[-1].usage == whole.usage or pieces[-1].usage is not None
    text = client.completions.create(model=model.id, prompt="1, 2, 3,", max_tokens=4, temperature=0, logprobs=2, seed=1)
    assert text.choices[0].text
    assert text.choices[0].logprobs is not None
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=model.id, prompt="x", max_tokens=-1)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nope", prompt="x")
