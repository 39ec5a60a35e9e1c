"""The asyncio client against the same scripted server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

import kvferry
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2
from tests.sdk.fake_gateway import FakeGateway, answer, chunk, finished, refuse, started


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with FakeGateway(answer("Hel", "lo", "!")) as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: FakeGateway) -> AsyncIterator[kvferry.AsyncClient]:
    async with kvferry.AsyncClient(gateway.address) as client:
        yield client


async def happened(event: threading.Event) -> bool:
    return await asyncio.to_thread(event.wait, 10)


async def test_stream_yields_chunks_in_order(client: kvferry.AsyncClient) -> None:
    async with client.generate("Say hello") as stream:
        assert [chunk.text async for chunk in stream] == ["Hel", "lo", "!"]
    assert (stream.text, stream.finish_reason, stream.seed) == ("Hello!", kvferry.FinishReason.STOP, 7)
    assert stream.timeline is not None
    assert stream.usage is not None
    assert [chunk async for chunk in stream] == []


async def test_chat_result(client: kvferry.AsyncClient, gateway: FakeGateway) -> None:
    completion = await client.chat([{"role": "user", "content": "Hi"}], max_tokens=4).result()
    assert (completion.text, completion.token_ids) == ("Hello!", (100, 101, 102))
    (request,) = gateway.requests
    assert isinstance(request, inference_pb2.GenerateRequest)
    assert (request.chat.messages[0].content, request.sampling.max_tokens) == ("Hi", 4)


async def test_both_clients_send_the_same(client: kvferry.AsyncClient, gateway: FakeGateway) -> None:
    options = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.25, "top_k": 4, "seed": 1, "stop": ["end"]}
    options |= {
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": 1,
        "speculate": True,
        "priority": 7,
        "model": "tiny",
        "request_id": "mine",
    }
    await client.generate([1, 2], **options).result()
    await client.chat([{"role": "user", "content": "Hi"}], **options).result()

    def blocking() -> None:
        with kvferry.Client(gateway.address) as other:
            other.generate([1, 2], **options).result()
            other.chat([{"role": "user", "content": "Hi"}], **options).result()

    await asyncio.to_thread(blocking)
    assert gateway.requests[:2] == gateway.requests[2:]
    assert gateway.requests[0].sampling.ignore_eos
    assert gateway.requests[0].sampling.speculate
    assert gateway.requests[0].priority == 7


async def test_a_slow_reader_loses_nothing_of_a_long_answer(client: kvferry.AsyncClient, gateway: FakeGateway) -> None:
    last = threading.Event()

    def script(
        request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        yield started()
        for index in range(200):
            yield chunk(f"{index} ", common_pb2.Token(index=index, id=index))
        yield finished(num_output_tokens=200)
        last.set()

    gateway.scripts = [script]
    stream = client.generate("x")
    assert await happened(last)
    assert (await stream.result()).token_ids == tuple(range(200))


async def test_errors_keep_their_type_and_details(client: kvferry.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scripts = [refuse(kvferry.InvalidRequestError("top_p must be in (0, 1]", reason="BAD_TOP_P"))]
    with pytest.raises(kvferry.InvalidRequestError, match="top_p") as caught:
        await client.generate("x").result()
    assert caught.value.reason == "BAD_TOP_P"
    assert len(gateway.requests) == 1


async def test_retries_before_the_first_event_only(client: kvferry.AsyncClient, gateway: FakeGateway) -> None:
    fine = gateway.scripts[0]
    gateway.scripts = [
        refuse(kvferry.UnavailableError("no decode worker")),
        refuse(kvferry.OverloadedError("busy", retry_after_s=0.1)),
        fine,
    ]
    assert (await client.generate("x").result()).text == "Hello!"
    assert len(gateway.requests) == 3

    def breaks(
        request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        yield started()
        yield from refuse(kvferry.UnavailableError("the worker was lost"))(request, context)

    gateway.scripts = [breaks, fine]
    with pytest.raises(kvferry.UnavailableError, match="lost"):
        await client.generate("x").result()
    assert len(gateway.requests) == 4


async def test_a_hint_beyond_the_deadline_gives_the_refusal_at_once(
    client: kvferry.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scripts = [refuse(kvferry.OverloadedError("busy", retry_after_s=60))]
    began = time.monotonic()
    with pytest.raises(kvferry.OverloadedError):
        await client.generate("x", timeout=5).result()
    assert time.monotonic() - began < 4


async def test_leaving_the_block_cancels_the_call(client: kvferry.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scripts = [gateway.hold]
    async with client.generate("x") as stream:
        assert (await anext(stream)).text == "one"
    assert await happened(gateway.cancelled)
    with pytest.raises(kvferry.CancelledError):
        await anext(stream)


@pytest.mark.parametrize("script", ["hold", "hang"])
async def test_close_by_another_task_is_a_kvferry_error(
    client: kvferry.AsyncClient, gateway: FakeGateway, script: str
) -> None:
    gateway.scripts = [getattr(gateway, script)]
    stream = client.generate("x")
    reader = asyncio.create_task(stream.result())
    asyncio.get_running_loop().call_later(0.1, stream.close)
    with pytest.raises(kvferry.CancelledError):
        await asyncio.wait_for(reader, 10)
    assert await happened(gateway.cancelled)


@pytest.mark.parametrize("script", ["hold", "hang"])
async def test_cancelling_the_reading_task_cancels_the_call(
    client: kvferry.AsyncClient, gateway: FakeGateway, script: str
) -> None:
    gateway.scripts = [getattr(gateway, script)]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await client.generate("x").result()
    assert await happened(gateway.cancelled)


async def test_the_deadline_ends_a_stream(client: kvferry.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scripts = [gateway.hold]
    with pytest.raises(kvferry.DeadlineError):
        await client.generate("x", timeout=0.3).result()
    assert await happened(gateway.cancelled)


async def test_unary_calls(client: kvferry.AsyncClient, gateway: FakeGateway) -> None:
    gateway.failures = [kvferry.UnavailableError("starting")]
    assert (await client.models())[0].name == "tiny"
    assert len(gateway.requests) == 2
    assert await client.tokenize([kvferry.ChatMessage("user", "Hi")]) == (5, 6, 7)
    assert await client.detokenize([1, 2]) == "12"
    assert [worker.worker_id for worker in (await client.cluster()).workers] == ["prefill-0", "decode-0"]
    gateway.serving = b"\x08\x02"
    assert await client.health() is kvferry.HealthStatus.NOT_SERVING


async def test_a_call_that_a_gateway_cancels_because_it_shuts_down_is_made_again(
    client: kvferry.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scripts = [refuse(kvferry.CancelledError("CANCELLED")), *gateway.scripts]
    assert (await client.generate("x").result()).text


async def test_a_gateway_that_is_away_is_left_for_the_next(gateway: FakeGateway) -> None:
    async with kvferry.AsyncClient(f"127.0.0.1:1,{gateway.address}", max_attempts=2) as client:
        assert await client.models()
    async with kvferry.AsyncClient(f"127.0.0.1:1,{gateway.address}", max_attempts=2) as client:
        assert (await client.generate("x").result()).text


async def test_unary_errors_are_typed(client: kvferry.AsyncClient, gateway: FakeGateway) -> None:
    gateway.failures = [kvferry.NotFoundError("no model named x", reason="UNKNOWN_MODEL")]
    with pytest.raises(kvferry.NotFoundError, match="no model named x") as caught:
        await client.tokenize("x", model="x")
    assert caught.value.reason == "UNKNOWN_MODEL"


async def test_a_closed_client_says_so(gateway: FakeGateway) -> None:
    client = kvferry.AsyncClient(gateway.address)
    await client.close()
    await client.close()
    with pytest.raises(kvferry.ConflictError, match="closed"):
        await client.models()
    with pytest.raises(kvferry.ConflictError, match="closed"):
        client.generate("x")


async def test_api_key_goes_with_every_call(gateway: FakeGateway) -> None:
    async with kvferry.AsyncClient(gateway.address, api_key="s3cret") as client:
        await client.models()
        await client.generate("x").result()
    assert [m.get("authorization") for m in gateway.metadata] == ["Bearer s3cret"] * 2


def test_outside_a_loop_the_asyncio_client_cannot_be_made() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        kvferry.AsyncClient("127.0.0.1:1")
