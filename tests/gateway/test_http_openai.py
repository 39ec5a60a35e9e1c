"""OpenAI's own client against the real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import openai
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletionChunk

from gateway.http.app import create_app
from gateway.http.server import HttpServer
from kvferry import errors
from tests.gateway.scripted import MODEL, VOCABULARY, ScriptedFrontDoor, Step, chunk, finished, started

T = TypeVar("T")

MESSAGES: Any = [{"role": "user", "content": "hi"}]


class Gateway:
    def __init__(self, front_door: ScriptedFrontDoor, port: int) -> None:
        self.front_door = front_door
        self.options: dict[str, Any] = {
            "base_url": f"http://127.0.0.1:{port}/v1",
            "api_key": "none",
            "max_retries": 0,
            "timeout": 10,
        }

    def plays(self, *script: Step) -> None:
        self.front_door.script = script

    async def sync(self, call: Callable[[openai.OpenAI], T]) -> T:
        """The synchronous client, in a thread, since the server needs this one."""

        def run() -> T:
            with openai.OpenAI(**self.options) as client:
                return call(client)

        return await asyncio.to_thread(run)

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**{**self.options, **options})


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[Gateway]:
    front_door = ScriptedFrontDoor(started(), chunk("Hé"), chunk("llo", start=3), finished())
    server = HttpServer(create_app(front_door, vocabulary=VOCABULARY))
    port = await server.start("127.0.0.1", 0)
    yield Gateway(front_door, port)
    await server.stop(0.2)


async def test_models(gateway: Gateway) -> None:
    assert await gateway.sync(lambda client: [model.id for model in client.models.list()]) == [MODEL]
    async with gateway.client() as client:
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-9")


async def test_chat(gateway: Gateway) -> None:
    def ask(client: openai.OpenAI) -> Any:
        return client.chat.completions.create(model=MODEL, messages=MESSAGES)

    async with gateway.client() as client:
        for answer in (
            await gateway.sync(ask),
            await client.chat.completions.create(model=MODEL, messages=MESSAGES),
        ):
            [choice] = answer.choices
            assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Héllo", "stop")
            assert answer.usage is not None
            assert answer.usage.total_tokens == 12
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == 4


async def test_chat_streamed(gateway: Gateway) -> None:
    def ask(client: openai.OpenAI) -> list[ChatCompletionChunk]:
        usage: Any = {"include_usage": True}
        with client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options=usage
        ) as stream:
            return list(stream)

    async with gateway.client() as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        for chunks in (await gateway.sync(ask), [each async for each in stream]):
            *answer, last = chunks
            assert "".join(each.choices[0].delta.content or "" for each in answer) == "Héllo"
            assert answer[0].choices[0].delta.role == "assistant"
            assert answer[-1].choices[0].finish_reason == "stop"
            assert not last.choices
            assert last.usage is not None
            assert last.usage.completion_tokens == 5


async def test_completions(gateway: Gateway) -> None:
    def stream(client: openai.OpenAI) -> str:
        with client.completions.create(model=MODEL, prompt="hi", stream=True) as chunks:
            return "".join(each.choices[0].text for each in chunks)

    assert await gateway.sync(stream) == "Héllo"
    assert (
        await gateway.sync(lambda client: client.completions.create(model=MODEL, prompt=[1, 2]).choices[0].text)
        == "Héllo"
    )
    async with gateway.client() as client:
        answer = await client.completions.create(model=MODEL, prompt="hi", max_tokens=3, stop=["x"])
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Héllo", "stop")
        chunks = await client.completions.create(model=MODEL, prompt=["hi"], stream=True)
        assert "".join([each.choices[0].text async for each in chunks]) == "Héllo"


async def test_logprobs(gateway: Gateway) -> None:
    gateway.plays(started(), chunk("ab", num_top=2), finished())
    async with gateway.client() as client:
        chat = await client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2)
        logprobs = chat.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [(each.token, each.logprob, each.bytes) for each in logprobs.content] == [
            ("a", -1, [97]),
            ("b", -1, [98]),
        ]
        assert [(top.token, top.logprob) for top in logprobs.content[0].top_logprobs] == [("a", -1), ("b", -2)]
        text = await client.completions.create(model=MODEL, prompt="hi", logprobs=2)
        tokens = text.choices[0].logprobs
        assert tokens is not None
        assert (tokens.tokens, tokens.text_offset) == (["a", "b"], [0, 1])
        assert tokens.top_logprobs == [{"a": -1, "b": -2}, {"b": -1, "c": -2}]
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, stream=True)
        streamed = [each.choices[0].logprobs async for each in stream]
        assert [token.token for each in streamed if each for token in each.content or ()] == ["a", "b"]


async def test_an_answer_goes_back_as_the_next_question(gateway: Gateway) -> None:
    async with gateway.client() as client:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        more = [*MESSAGES, answer.choices[0].message, {"role": "user", "content": "and?"}]
        await client.chat.completions.create(model=MODEL, messages=more)
    roles = [message.role for message in gateway.front_door.requests[-1].chat.messages]
    assert roles == ["user", "assistant", "user"]


async def test_the_timeline_and_request_id(gateway: Gateway) -> None:
    async with gateway.client() as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_headers={"x-kvferry-timeline": "1", "x-request-id": "mine"}
        )
    assert answer._request_id == "mine"
    extra: Any = answer.model_extra
    assert extra["kvferry"]["timeline"]["decode_worker"] == "decode-0"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (errors.InvalidRequestError("no", reason="CONTEXT_LENGTH_EXCEEDED"), openai.BadRequestError),
        (errors.UnauthenticatedError("no"), openai.AuthenticationError),
        (errors.PermissionDeniedError("no"), openai.PermissionDeniedError),
        (errors.NotFoundError("no"), openai.NotFoundError),
        (errors.OverloadedError("no"), openai.RateLimitError),
        (errors.UnavailableError("no"), openai.InternalServerError),
        (errors.DeadlineError("no"), openai.InternalServerError),
        (errors.InternalError("no"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_have_their_class(
    gateway: Gateway, failure: errors.Error, expected: type[openai.APIStatusError], stream: bool
) -> None:
    gateway.plays(failure)
    async with gateway.client() as client:
        with pytest.raises(expected) as caught:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
    assert caught.value.code == failure.reason.lower()
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"] == "no"


async def test_a_refused_field_is_named(gateway: Gateway) -> None:
    async with gateway.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, verbosity="low")
        assert (caught.value.param, caught.value.code) == ("verbosity", "unknown_parameter")
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="gpt-9", messages=MESSAGES)
        assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")


async def test_an_error_in_midstream_raises_after_the_text(gateway: Gateway) -> None:
    gateway.plays(started(), chunk("Hé"), errors.UnavailableError("the decode worker was lost"))
    texts = []
    async with gateway.client() as client:
        stream = await client.completions.create(model=MODEL, prompt="hi", stream=True)
        with pytest.raises(openai.APIError, match="the decode worker was lost"):  # noqa: PT012
            async for each in stream:
                texts.append(each.choices[0].text)
    assert texts == ["Hé"]


async def test_a_refusal_is_tried_again_after_its_hint(gateway: Gateway) -> None:
    gateway.plays(errors.OverloadedError("no", retry_after_s=0.01))
    async with gateway.client(max_retries=2) as client:
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert len(gateway.front_door.requests) == 3


async def test_closing_the_stream_ends_the_generation(gateway: Gateway) -> None:
    gateway.plays(started(), chunk("Hé"), asyncio.Event())
    async with gateway.client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        async for each in stream:
            if each.choices[0].delta.content:
                break
        await stream.close()
        async with asyncio.timeout(5):
            await gateway.front_door.idle.wait()
    assert (gateway.front_door.num_running, gateway.front_door.num_cancelled) == (0, 1)
