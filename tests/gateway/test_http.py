"""The application in memory: requests, answers, errors."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from gateway.doorkeeper import Doorkeeper
from gateway.http.app import HttpLimits, create_app
from gateway.tenants import Keyring, Tenant
from kvferry import errors
from kvferry.api.common.v1 import common_pb2
from tests.gateway.scripted import END, MODEL, VOCABULARY, ScriptedFrontDoor, chunk, finished, started

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
LIMITS = HttpLimits(max_body_nbytes=4096, default_timeout_s=20, max_timeout_s=60)


def client_of(front_door: ScriptedFrontDoor) -> httpx.AsyncClient:
    app = create_app(front_door, vocabulary=VOCABULARY, limits=LIMITS)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway")


async def post(front_door: ScriptedFrontDoor, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    async with client_of(front_door) as client:
        return await client.post(path, content=content, headers=named)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hi", **fields}


def answering() -> ScriptedFrontDoor:
    return ScriptedFrontDoor(started(), chunk("Hé"), chunk("", [END], start=3), chunk("llo", start=4), finished())


def events_of(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") for frame in frames)
    return [frame if frame == "data: [DONE]" else json.loads(frame.removeprefix("data: ")) for frame in frames]


USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 4},
}


async def test_a_whole_chat_answer() -> None:
    response = await post(answering(), CHAT, chat(), x_request_id="abc-1")
    content = response.json()
    assert content.pop("created") > 1_700_000_000
    assert content == {
        "id": "chatcmpl-abc-1",
        "object": "chat.completion",
        "model": MODEL,
        "system_fingerprint": "rev-9",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Héllo", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }


async def test_a_whole_completion() -> None:
    front_door = ScriptedFrontDoor(started(), chunk("Hé"), finished(common_pb2.FINISH_REASON_LENGTH))
    content = (await post(front_door, TEXT, text(), x_request_id="abc-1")).json()
    del content["created"]
    assert content == {
        "id": "cmpl-abc-1",
        "object": "text_completion",
        "model": MODEL,
        "system_fingerprint": "rev-9",
        "choices": [{"index": 0, "text": "Hé", "logprobs": None, "finish_reason": "length"}],
        "usage": USAGE,
    }


async def test_a_streamed_chat_answer_has_an_event_per_chunk_with_text() -> None:
    *events, done = events_of(await post(answering(), CHAT, chat(stream=True)))
    assert done == "data: [DONE]"
    assert [event["choices"][0]["delta"] for event in events] == [
        {"role": "assistant", "content": ""},
        {"content": "Hé"},
        {"content": "llo"},
        {},
    ]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "stop"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert not any("usage" in event for event in events)


async def test_a_streamed_completion_with_usage() -> None:
    body = text(stream=True, stream_options={"include_usage": True})
    *events, last, done = events_of(await post(answering(), TEXT, body))
    assert done == "data: [DONE]"
    assert [event["choices"][0]["text"] for event in events] == ["Hé", "llo", ""]
    assert [event["usage"] for event in events] == [None] * 3
    assert (last["choices"], last["usage"]) == ([], USAGE)


async def test_a_stream_tells_its_tokens_so_far() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last, _ = events_of(await post(answering(), TEXT, text(stream=True, stream_options=options)))
    assert [event["usage"]["completion_tokens"] for event in events] == [3, 7, 5]
    assert {event["usage"]["prompt_tokens"] for event in (*events, last)} == {7}
    assert (last["choices"], last["usage"]) == ([], USAGE)


@pytest.mark.parametrize(
    "fields",
    [{"ignore_eos": True}, {"ignore_eos": True, "min_tokens": 3}, {"min_tokens": 9}],
)
async def test_answers_as_long_as_asked(fields: dict[str, Any]) -> None:
    front_door = answering()
    assert (await post(front_door, TEXT, text(max_tokens=9, **fields))).status_code == 200
    assert front_door.requests[0].sampling == common_pb2.SamplingParams(max_tokens=9, ignore_eos=True)


async def test_text_of_any_kind_survives_the_event_stream() -> None:
    odd = 'a\n\n\r"data: \u2028\x85\x1e🦆\ud7ff'
    *events, _ = events_of(await post(ScriptedFrontDoor(started(), chunk(odd), finished()), TEXT, text(stream=True)))
    assert "".join(event["choices"][0]["text"] for event in events) == odd


async def test_chat_logprobs() -> None:
    # The character é comes as two tokens: their text lags, their log-probabilities do not.
    script = (started(), chunk("", [0xC3], num_top=2), chunk("é", [0xA9], start=1, num_top=2), finished())
    body = chat(logprobs=True, top_logprobs=2)
    choice = (await post(ScriptedFrontDoor(*script), CHAT, body)).json()["choices"][0]
    first = {"token": "\ufffd", "logprob": -1.0, "bytes": [0xC3]}
    assert choice["logprobs"]["content"][0] == {
        **first,
        "top_logprobs": [first, {"token": "\ufffd", "logprob": -2.0, "bytes": [0xC4]}],
    }
    *events, _, _ = events_of(await post(ScriptedFrontDoor(*script), CHAT, {**body, "stream": True}))
    assert [event["choices"][0]["delta"].get("content") for event in events] == ["", "", "é"]
    streamed = [entry for event in events[1:] for entry in event["choices"][0]["logprobs"]["content"]]
    assert streamed == choice["logprobs"]["content"]


async def test_completion_logprobs() -> None:
    script = (started(), chunk("Hé", num_top=1), chunk("l", [ord("l"), END], start=3, num_top=1), finished())
    logprobs = (await post(ScriptedFrontDoor(*script), TEXT, text(logprobs=1))).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["H", "\ufffd", "\ufffd", "l", "<end>"],
        "token_logprobs": [-1.0] * 5,
        "top_logprobs": [{"H": -1.0}, {"\ufffd": -1.0}, {"\ufffd": -1.0}, {"l": -1.0}, {"\x00": -1.0, "<end>": -1.0}],
        "text_offset": [0, 1, 1, 2, 3],
    }
    *events, _, _ = events_of(await post(ScriptedFrontDoor(*script), TEXT, text(logprobs=1, stream=True)))
    assert [offset for event in events for offset in event["choices"][0]["logprobs"]["text_offset"]] == [0, 1, 1, 2, 3]


async def test_an_impossible_token_still_makes_valid_json() -> None:
    response = chunk("a", num_top=1)
    response.chunk.tokens[0].logprob = float("-inf")
    response.chunk.tokens[0].top_logprobs[0].logprob = float("-inf")
    content = (await post(ScriptedFrontDoor(response, finished()), CHAT, chat(logprobs=True))).json()
    assert content["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


async def test_every_field_reaches_the_front_door() -> None:
    front_door = answering()
    fields = {"temperature": 0, "top_p": 0.5, "top_k": 4, "seed": -1, "stop": ["a", "b"], "logprobs": True}
    fields |= {"speculate": False, "priority": -2}
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": False, "n": 1, "stream": False, "presence_penalty": 0.0}
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None},
    ]
    body = {"model": MODEL, "messages": messages, "max_completion_tokens": 9, "top_logprobs": 3, **fields, **ignored}
    assert (await post(front_door, CHAT, body, x_request_id="me")).status_code == 200
    [request] = front_door.requests
    assert [(m.role, m.content) for m in request.chat.messages] == [
        ("system", "d"),
        ("system", "s"),
        ("user", "ab"),
        ("assistant", "c"),
    ]
    assert request.sampling == common_pb2.SamplingParams(
        max_tokens=9, temperature=0, top_p=0.5, top_k=4, seed=2**64 - 1, num_logprobs=3, speculate=False
    )
    assert (request.model, list(request.stop), request.request_id, request.priority) == (MODEL, ["a", "b"], "me", -2)


async def test_what_is_not_said_stays_unset() -> None:
    front_door = answering()
    await post(front_door, CHAT, chat(temperature=None, stop=None))
    await post(front_door, TEXT, text(stop="x", logprobs=0))
    chat_request, text_request = front_door.requests
    assert chat_request.sampling == common_pb2.SamplingParams()
    # OpenAI's default for completions.
    assert text_request.sampling == common_pb2.SamplingParams(max_tokens=16, num_logprobs=0)
    assert list(text_request.stop) == ["x"]


@pytest.mark.parametrize(
    ("prompt", "kind", "expected"), [("a", "text", "a"), (["a"], "text", "a"), ([5, 6], "token_ids", [5, 6])]
)
async def test_prompts(prompt: Any, kind: str, expected: Any) -> None:
    front_door = answering()
    await post(front_door, TEXT, text(prompt=prompt))
    [request] = front_door.requests
    assert request.WhichOneof("prompt") == kind
    assert (request.text if kind == "text" else list(request.token_ids.ids)) == expected


BAD_FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, chat(frobnicate=1), "frobnicate", "unknown field 'frobnicate'"),
    (CHAT, chat(prompt="x"), "prompt", "unknown field 'prompt'"),
    (TEXT, text(max_completion_tokens=1), "max_completion_tokens", "unknown field 'max_completion_tokens'"),
    (CHAT, {"model": MODEL}, "messages", "'messages' is required"),
    (CHAT, {"messages": []}, "model", "'model' is required"),
    (CHAT, chat(messages=[]), "messages", "at least 1 item"),
    (CHAT, chat(messages=[{"role": "tool", "content": ""}]), "messages[0].role", 'not "tool"'),
    (CHAT, chat(messages=[{"role": "user", "content": 5}]), "messages[0].content", "array of text parts"),
    (CHAT, chat(messages=[{"role": "user", "content": "", "name": "x"}]), "messages[0].name", "unknown field"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "text": ""}]}]),
        "messages[0].content[0].type",
        "must be 'text'",
    ),
    (TEXT, text(prompt=""), "prompt", "at least 1 character"),
    (TEXT, text(prompt=[]), "prompt", "at least 1 item"),
    (TEXT, text(prompt=["a", "b"]), "prompt", "at most 1 item"),
    (TEXT, text(prompt=[[1]]), "prompt[0]", "valid integer"),
    (TEXT, text(prompt=[1, True]), "prompt[1]", "valid integer"),
    (TEXT, text(prompt=[-1]), "prompt[0]", "greater than or equal to 0"),
    (TEXT, text(prompt=None), "prompt", "a string, an array of one string, or an array of token ids"),
    (TEXT, text(max_tokens=0), "max_tokens", "'max_tokens' must be greater than or equal to 1, not 0"),
    (TEXT, text(max_tokens=-5), "max_tokens", "not -5"),
    (TEXT, text(max_tokens=2**31), "max_tokens", "less than or equal to"),
    (TEXT, text(max_tokens="5"), "max_tokens", 'valid integer, not "5"'),
    (TEXT, text(max_tokens=5.0), "max_tokens", "valid integer"),
    (TEXT, text(temperature=-0.1), "temperature", "greater than or equal to 0, not -0.1"),
    (TEXT, text(temperature=float("nan")), "temperature", "finite"),
    (TEXT, text(temperature=True), "temperature", "valid number, not true"),
    (TEXT, text(top_p=0), "top_p", "greater than 0"),
    (TEXT, text(top_p=1.5), "top_p", "less than or equal to 1"),
    (TEXT, text(top_k=-1), "top_k", "greater than or equal to 0"),
    (TEXT, text(speculate="yes"), "speculate", "valid boolean"),
    (TEXT, text(seed=2**64), "seed", "less than or equal to"),
    (TEXT, text(n=2), "n", "'n' must be 1, the only value served, not 2"),
    (TEXT, text(n=True), "n", "valid integer"),
    (
        TEXT,
        text(frequency_penalty=0.5),
        "frequency_penalty",
        "'frequency_penalty' must be 0, the only value served, not 0.5",
    ),
    (TEXT, text(echo=True), "echo", "'echo' must be false"),
    (TEXT, text(stop=""), "stop", "at least 1 character"),
    (TEXT, text(stop=["a"] * 17), "stop", "at most 16 items"),
    (TEXT, text(stop=["a", 1]), "stop[1]", "valid string"),
    (TEXT, text(stop=3), "stop", "a string or an array of strings"),
    (TEXT, text(stream="yes"), "stream", "valid boolean"),
    (TEXT, text(stream_options={"include_usage": True}), "stream_options", "'stream': true"),
    (TEXT, text(stream=True, stream_options={"x": 1}), "stream_options.x", "unknown field"),
    (TEXT, text(max_tokens=9, min_tokens=3), "min_tokens", "only with 'ignore_eos': true"),
    (TEXT, text(max_tokens=9, min_tokens=10, ignore_eos=True), "min_tokens", "at most 'max_tokens', which is 9"),
    (TEXT, text(min_tokens=3, ignore_eos=True, stop="x"), "min_tokens", "does not go with 'stop'"),
    (TEXT, text(logprobs=21), "logprobs", "less than or equal to 20"),
    (TEXT, text(logprobs=True), "logprobs", "valid integer"),
    (CHAT, chat(logprobs=1), "logprobs", "valid boolean"),
    (CHAT, chat(top_logprobs=1), "top_logprobs", "goes only with 'logprobs': true"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "less than or equal to 20"),
    (CHAT, chat(max_tokens=1, max_completion_tokens=2), "max_tokens", "give one of them"),
    (TEXT, text(metadata={"a": 1}), "metadata.a", "valid string"),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), BAD_FIELDS)
async def test_bad_fields_are_refused_by_name(path: str, body: dict[str, Any], param: str, message: str) -> None:
    front_door = answering()
    response = await post(front_door, path, body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]
    assert not front_door.requests


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model": "\xff"}', "not valid UTF-8 at byte 11"),
        (b'{"model": "\\ud800"}', "not valid JSON"),
        (b"[" * 3000, "not valid JSON"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_bodies_that_are_no_json_object(path: str, body: bytes, message: str) -> None:
    response = await post(answering(), path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, None, "invalid_json")
    assert message in error["message"]


async def test_a_body_over_the_limit_is_refused_by_its_declared_size() -> None:
    response = await post(answering(), TEXT, text(prompt="x" * 5000))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert "4096 bytes" in response.json()["error"]["message"]


async def test_a_body_of_unknown_size_is_refused_when_it_passes_the_limit() -> None:
    num_taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_taken
        for _ in range(5):
            num_taken += 1
            yield b" " * 1024

    async with client_of(answering()) as client:
        response = await client.post(TEXT, content=endless())
    assert response.status_code == 413
    assert num_taken == 5


async def test_a_body_at_the_limit_is_served() -> None:
    body = json.dumps(text()).encode()
    assert (await post(answering(), TEXT, body.ljust(4096))).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_an_unknown_model(path: str) -> None:
    body = (chat if path == CHAT else text)(model="gpt-9")
    response = await post(answering(), path, body)
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": f"the model 'gpt-9' does not exist; this gateway serves '{MODEL}'",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("POST", CHAT + "/", 404, "unknown_url"),
        ("GET", "/v1/models/nope", 404, "model_not_found"),
    ],
)
async def test_wrong_paths_and_methods(method: str, path: str, status: int, code: str) -> None:
    async with client_of(answering()) as client:
        response = await client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert ("allow" in response.headers) == (status == 405)
    assert response.headers["x-request-id"]


async def test_models() -> None:
    async with client_of(answering()) as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get(f"/v1/models/{MODEL}")).json()
    assert listed == {"object": "list", "data": [one]}
    assert (one["id"], one["object"], one["owned_by"]) == (MODEL, "model", "kvferry")


async def test_health_follows_the_front_door() -> None:
    front_door = answering()
    async with client_of(front_door) as client:
        assert (await client.get("/health")).status_code == 200
        front_door.ready = False
        assert (await client.get("/health")).status_code == 503


async def test_metrics() -> None:
    async with client_of(answering()) as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE process_cpu_seconds_total counter" in response.text


FAILURES: list[tuple[Exception, int, str, str]] = [
    (errors.InvalidRequestError("no", metadata={"field": "prompt"}), 400, "invalid_request_error", "invalid_request"),
    (errors.UnauthenticatedError("no"), 401, "authentication_error", "unauthenticated"),
    (errors.PermissionDeniedError("no"), 403, "permission_error", "permission_denied"),
    (errors.NotFoundError("no"), 404, "invalid_request_error", "not_found"),
    (errors.ConflictError("no"), 409, "invalid_request_error", "conflict"),
    (errors.OverloadedError("no", reason="QUEUE_FULL"), 429, "rate_limit_error", "queue_full"),
    (errors.UnavailableError("no"), 503, "server_error", "unavailable"),
    (errors.AbortedError("no"), 503, "server_error", "aborted"),
    (errors.DeadlineError("no"), 504, "server_error", "deadline_exceeded"),
    (errors.InternalError("no"), 500, "server_error", "internal"),
    (errors.Error("no"), 500, "server_error", "unknown"),
]


@pytest.mark.parametrize(("failure", "status", "kind", "code"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("late", [False, True], ids=["refused", "failed before the first token"])
async def test_errors_before_the_first_token_have_their_status(
    failure: errors.Error, status: int, kind: str, code: str, stream: bool, late: bool
) -> None:
    front_door = ScriptedFrontDoor(*([started()] if late else []), failure)
    response = await post(front_door, CHAT, chat(stream=stream))
    param = failure.metadata.get("field")
    assert response.status_code == status
    assert response.json() == {"error": {"message": "no", "type": kind, "param": param, "code": code}}
    assert front_door.num_running == 0


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (errors.OverloadedError("no"), ("1", "1000")),
        (errors.OverloadedError("no", retry_after_s=0.25), ("1", "250")),
        (errors.UnavailableError("no", retry_after_s=2.5), ("3", "2500")),
        (errors.UnavailableError("no"), (None, None)),
    ],
)
async def test_retry_after(failure: errors.Error, expected: tuple[str | None, str | None]) -> None:
    response = await post(ScriptedFrontDoor(failure), CHAT, chat())
    assert (response.headers.get("retry-after"), response.headers.get("retry-after-ms")) == expected


@pytest.mark.parametrize(("failure", "status", "kind", "code"), FAILURES)
async def test_an_error_in_midstream_is_the_last_event(
    failure: errors.Error, status: int, kind: str, code: str
) -> None:
    front_door = ScriptedFrontDoor(started(), chunk("a"), failure)
    response = await post(front_door, TEXT, text(stream=True))
    first, last = events_of(response)
    assert (response.status_code, first["choices"][0]["text"]) == (200, "a")
    assert (last["error"]["type"], last["error"]["code"], last["error"]["message"]) == (kind, code, "no")


@pytest.mark.parametrize("script", [(ValueError("secret"),), (started(),)], ids=["a bug", "no end"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_500_and_keeps_its_text(script: Any, stream: bool) -> None:
    response = await post(ScriptedFrontDoor(*script), CHAT, chat(stream=stream), x_request_id="id-7")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert response.headers["x-request-id"] == "id-7"
    assert "secret" not in response.text


async def test_a_bug_in_midstream_keeps_its_text() -> None:
    front_door = ScriptedFrontDoor(chunk("a"), ValueError("secret"))
    *_, last = events_of(await post(front_door, CHAT, chat(stream=True), x_request_id="id-7"))
    assert "secret" not in last["error"]["message"]
    assert "id-7" in last["error"]["message"]


async def test_an_answer_that_breaks_off_is_an_error() -> None:
    *_, last = events_of(await post(ScriptedFrontDoor(chunk("a")), CHAT, chat(stream=True)))
    assert last["error"]["code"] == "internal"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_deadline_ends_the_wait_for_the_first_token(stream: bool) -> None:
    front_door = ScriptedFrontDoor(started(), asyncio.Event())
    response = await post(front_door, CHAT, chat(stream=stream), x_request_timeout="0.05")
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert (front_door.num_running, front_door.num_cancelled) == (0, 1)


async def test_the_deadline_ends_a_stream() -> None:
    front_door = ScriptedFrontDoor(chunk("a"), asyncio.Event())
    response = await post(front_door, TEXT, text(stream=True), x_request_timeout="0.05")
    first, last = events_of(response)
    assert first["choices"][0]["text"] == "a"
    assert last["error"]["code"] == "deadline_exceeded"
    assert (front_door.num_running, front_door.num_cancelled) == (0, 1)


async def test_the_deadline_counts_while_the_body_arrives() -> None:
    async def stuck() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with client_of(answering()) as client:
        response = await client.post(TEXT, content=stuck(), headers={"x-request-timeout": "0.05"})
    assert response.status_code == 504


@pytest.mark.parametrize("value", ["0", "-1", "61", "nan", "inf", "soon", ""])
async def test_a_timeout_that_cannot_be_is_refused(value: str) -> None:
    response = await post(answering(), TEXT, text(), x_request_timeout=value)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "x-request-timeout")
    assert "up to 60" in error["message"]


async def test_request_ids_are_echoed_or_made_up() -> None:
    given = await post(answering(), TEXT, text(), x_request_id="mine")
    assert given.headers["x-request-id"] == "mine"
    for missing in ({}, {"x_request_id": "x" * 129}, {"x_request_id": "a\tb"}):
        front_door = answering()
        response = await post(front_door, TEXT, text(), **missing)
        made_up = response.headers["x-request-id"]
        assert len(made_up) == 32
        assert front_door.requests[0].request_id == made_up


async def test_the_timeline_comes_when_asked_for() -> None:
    whole = (await post(answering(), CHAT, chat(), x_kvferry_timeline="1")).json()
    timeline = whole["kvferry"]["timeline"]
    assert timeline["ttft_us"] == 2**40
    assert timeline["decode_worker"] == "decode-0"
    assert (timeline["transfer"]["num_blocks"], timeline["transfer"]["path"]) == (2, "mapped")
    assert timeline["num_retries"] == 0
    assert "prefill" not in timeline
    assert "ticket_us" not in timeline
    assert [chunk["compute_end_us"] for chunk in timeline["transfer"]["chunks"]] == [5, 9]
    *_, last, _ = events_of(await post(answering(), CHAT, chat(stream=True), x_kvferry_timeline="1"))
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["kvferry"] == whole["kvferry"]
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    *_, closing, last, _ = events_of(await post(answering(), TEXT, text(**usage), x_kvferry_timeline="1"))
    assert last["kvferry"] == whole["kvferry"]
    assert "kvferry" not in closing
    assert "kvferry" not in (await post(answering(), CHAT, chat())).json()


async def test_a_gateway_with_keys_lets_their_tenants_in_and_nobody_else() -> None:
    keys = Keyring([(hashlib.sha256(b"k").hexdigest(), Tenant("a", b"salt"))])
    front_door = answering()
    app = create_app(front_door, vocabulary=VOCABULARY, limits=LIMITS, doorkeeper=Doorkeeper(keys))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway") as client:
        for method, path in (("POST", CHAT), ("POST", TEXT), ("GET", "/v1/models"), ("GET", "/v1/models/x"),
                             ("GET", "/v1/nothing")):  # fmt: skip
            for headers in ({}, {"authorization": "Bearer other"}):
                response = await client.request(method, path, json=chat(), headers=headers)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["x-request-id"]
                error = response.json()["error"]
                assert error["type"] == "authentication_error"
                assert error["code"] == ("invalid_api_key" if headers else "missing_api_key")
        assert not front_door.requests
        response = await client.post(CHAT, json=chat(), headers={"authorization": "Bearer k"})
        assert response.json()["choices"][0]["message"]["content"] == "Héllo"
        assert front_door.tenants == [Tenant("a", b"salt")]
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
