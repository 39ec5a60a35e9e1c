"""Over a socket: what only a real server shows."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from gateway.answer import Outlet, deliver
from gateway.http.app import HttpLimits, create_app
from gateway.http.limits import MAX_HEAD_NBYTES, MAX_HEADERS
from gateway.http.server import HttpServer
from gateway.tenants import Tenant
from kvferry.api.inference.v1 import inference_pb2
from services.runtime.startup import StartupError
from tests.gateway.scripted import MODEL, VOCABULARY, ScriptedFrontDoor, chunk, finished, started

CHAT = "/v1/chat/completions"
SOON_S = 5


@asynccontextmanager
async def serving(
    front_door: ScriptedFrontDoor, *, limits: HttpLimits | None = None, grace_s: float = 0.2
) -> AsyncIterator[int]:
    server = HttpServer(create_app(front_door, vocabulary=VOCABULARY, limits=limits))
    port = await server.start("127.0.0.1", 0)
    try:
        yield port
    finally:
        async with asyncio.timeout(SOON_S):
            await server.stop(grace_s)


def body(stream: bool, **fields: Any) -> bytes:
    return json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields}
    ).encode()


@asynccontextmanager
async def asking(port: int, content: bytes, *headers: str) -> AsyncIterator[asyncio.StreamReader]:
    """A raw connection that has sent a request; leaving hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (f"POST {CHAT} HTTP/1.1", "host: gateway", f"content-length: {len(content)}", *headers, "", "")
    writer.write("\r\n".join(head).encode() + content)
    try:
        async with asyncio.timeout(SOON_S):
            yield reader
    finally:
        writer.transport.abort()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_while_waiting_for_the_first_token_ends_the_generation(stream: bool) -> None:
    front_door = ScriptedFrontDoor(started(), asyncio.Event())
    async with serving(front_door) as port:
        async with asking(port, body(stream)):
            await front_door.waiting.wait()
        async with asyncio.timeout(SOON_S):
            await front_door.idle.wait()
        assert (front_door.num_running, front_door.num_cancelled) == (0, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_between_tokens_ends_the_generation(stream: bool) -> None:
    front_door = ScriptedFrontDoor(started(), chunk("abc"), asyncio.Event())
    async with serving(front_door) as port:
        async with asking(port, body(stream)) as reader:
            if stream:
                await reader.readuntil(b'{"content":"abc"}')
            await front_door.waiting.wait()
        async with asyncio.timeout(SOON_S):
            await front_door.idle.wait()
        assert (front_door.num_running, front_door.num_cancelled) == (0, 1)


class Endless(ScriptedFrontDoor):
    """Has more to say than any buffer holds."""

    num_sent = 0

    async def generate(self, request: inference_pb2.GenerateRequest, tenant: Tenant, outlet: Outlet) -> None:
        try:
            while True:
                await deliver(chunk("x" * 10_000, [0]), outlet)
                self.num_sent += 1
                await asyncio.sleep(0)
        finally:
            self.idle.set()


async def test_hanging_up_without_reading_ends_the_generation() -> None:
    front_door = Endless()
    async with serving(front_door) as port:
        async with asking(port, body(True)):
            seen = -1
            # Until the buffers are full and the reader's slowness has reached the generation.
            while seen != front_door.num_sent:
                seen = front_door.num_sent
                await asyncio.sleep(0.1)
        assert seen > 0
        async with asyncio.timeout(SOON_S):
            await front_door.idle.wait()


async def test_the_deadline_ends_the_generation_for_a_client_that_does_not_read() -> None:
    front_door = Endless()
    async with serving(front_door) as port, asking(port, body(True), "x-request-timeout: 0.5"):
        await front_door.idle.wait()
        assert front_door.num_sent > 0


async def test_a_client_that_stops_reading_loses_its_stream_long_before_the_deadline() -> None:
    front_door = Endless()
    async with serving(front_door, limits=HttpLimits(write_timeout_s=0.3)) as port, asking(port, body(True)):
        await front_door.idle.wait()
        assert front_door.num_sent > 0


async def test_a_client_that_reads_slowly_keeps_its_stream() -> None:
    """The bound is on each write, not on the whole."""
    front_door = ScriptedFrontDoor(started(), *(chunk("x" * 100_000, [0]) for _ in range(100)), finished())
    limits = HttpLimits(write_timeout_s=1.0)
    async with serving(front_door, limits=limits) as port, asking(port, body(True)) as reader:
        seen = b""
        while b"[DONE]" not in seen:
            seen = seen[-16:] + await reader.read(500_000)
            await asyncio.sleep(0.02)


async def test_heads_and_nested_bodies_are_bounded() -> None:
    front_door = ScriptedFrontDoor(started(), finished())
    async with serving(front_door) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        with suppress(httpx.TransportError):  # closed while the client still sends
            much = {"x-much": "x" * 2_000_000}
            assert (await client.post(CHAT, content=body(False), headers=much)).status_code == 400
        assert not front_door.requests
        for depth in (300, 100_000):
            deep = b'{"model": "m", "messages": ' + b"[" * depth + b"]" * depth + b"}"
            response = await client.post(CHAT, content=deep)
            assert response.status_code == 400
            assert "recursion" in response.json()["error"]["message"]
        assert not front_door.requests


async def answer_to(port: int, head: bytes) -> bytes:
    """The first line.  The head leaves in one piece."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + b"\r\n")
    try:
        async with asyncio.timeout(SOON_S):
            return await reader.readline()
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(("more", "status"), [(0, b" 200 "), (1, b" 431 ")])
async def test_a_head_has_so_many_headers_and_bytes_and_no_more(more: int, status: bytes) -> None:
    async with serving(ScriptedFrontDoor()) as port:
        begin = b"GET /health HTTP/1.1\r\nhost: g\r\n"
        assert status in await answer_to(port, begin + b"x: y\r\n" * (MAX_HEADERS - 1 + more))
        counted = len(b"/health" + b"host: g\r\n" + b"x: \r\n")
        assert status in await answer_to(port, begin + b"x: " + b"y" * (MAX_HEAD_NBYTES - counted + more) + b"\r\n")


async def test_a_head_without_end_is_not_kept() -> None:
    async with serving(ScriptedFrontDoor()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nx: " + b"y" * (MAX_HEAD_NBYTES + 1))
        async with asyncio.timeout(SOON_S):
            assert b" 400 " in await reader.readline()
        writer.transport.abort()


@asynccontextmanager
async def impatient(**timeouts: float) -> AsyncIterator[int]:
    app = create_app(ScriptedFrontDoor(started(), finished()), vocabulary=VOCABULARY)
    server = HttpServer(app, **timeouts)
    try:
        yield await server.start("127.0.0.1", 0)
    finally:
        await server.stop(0.2)


@pytest.mark.parametrize("after_a_request", [False, True])
async def test_a_head_that_comes_byte_by_byte_is_not_waited_for(after_a_request: bool) -> None:
    async with impatient(head_timeout_s=0.3, idle_timeout_s=60) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if after_a_request:
            writer.write(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
            assert b"ready" in await reader.readuntil(b"}")
        writer.write(b"GET /health HTTP/1.1\r\n")
        async with asyncio.timeout(SOON_S):
            with suppress(ConnectionError):
                while not writer.is_closing() and not reader.at_eof():
                    writer.write(b"x: y\r\n")
                    await asyncio.sleep(0.02)
        writer.close()


async def test_a_head_that_stops_is_answered_408() -> None:
    async with impatient(head_timeout_s=0.3) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HT")
        async with asyncio.timeout(SOON_S):
            answer = await reader.read()
        assert b" 408 " in answer
        assert b"the request's head took longer than 0.3 s" in answer
        writer.close()


@pytest.mark.parametrize("after_a_request", [False, True])
async def test_a_connection_that_says_nothing_is_closed(after_a_request: bool) -> None:
    async with impatient(head_timeout_s=0.3, idle_timeout_s=0.3) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if after_a_request:
            writer.write(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
            assert b"ready" in await reader.readuntil(b"}")
        async with asyncio.timeout(SOON_S):
            assert await reader.read() == b""
        writer.close()


async def test_an_answer_may_take_longer_than_a_head() -> None:
    gate = asyncio.Event()
    server = HttpServer(
        create_app(ScriptedFrontDoor(started(), gate, chunk("abc"), finished()), vocabulary=VOCABULARY),
        head_timeout_s=0.2, idle_timeout_s=0.2,
    )  # fmt: skip
    port = await server.start("127.0.0.1", 0)
    async with asking(port, body(True)) as reader:
        await asyncio.sleep(0.6)
        gate.set()
        assert b"abc" in await reader.readuntil(b"[DONE]")
    await server.stop(0.2)


async def test_a_finished_request_is_not_taken_for_a_hang_up() -> None:
    front_door = ScriptedFrontDoor(started(), chunk("abc"), finished())
    async with serving(front_door) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for stream in (False, True) * 5:
            assert (await client.post(CHAT, content=body(stream))).status_code == 200
    assert len(front_door.requests) == 10
    assert (front_door.num_running, front_door.num_cancelled) == (0, 0)


async def test_tokens_arrive_as_they_come() -> None:
    gate = asyncio.Event()
    front_door = ScriptedFrontDoor(started(), chunk("abc"), gate, chunk("def"), finished())
    async with serving(front_door) as port, asking(port, body(True)) as reader:
        early = await reader.readuntil(b'{"content":"abc"}')
        assert b"200 OK" in early
        assert b"text/event-stream" in early
        gate.set()
        assert b'{"content":"def"}' in await reader.readuntil(b"[DONE]")


async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    front_door = ScriptedFrontDoor(started(), chunk("abc"), chunk("def"), finished())
    content = body(True)
    async with serving(front_door) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"POST {CHAT} HTTP/1.0\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
        async with asyncio.timeout(SOON_S):
            answer = await reader.read()
        writer.close()
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert events.startswith(b"data: ")
    assert all(line.startswith(b"data: ") for line in events.split(b"\n\n") if line)
    assert b"abc" in events
    assert b"def" in events


async def test_ten_megabytes_are_refused_and_the_client_hears_of_it() -> None:
    front_door = ScriptedFrontDoor(started(), finished())
    async with serving(front_door) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for content in (b" " * 10_000_000, in_parts(10_000_000)):
            response = await client.post(CHAT, content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
            assert response.headers["connection"] == "close"
        assert (await client.post(CHAT, content=body(False))).status_code == 200


async def in_parts(nbytes: int) -> AsyncIterator[bytes]:
    for _ in range(nbytes // 100_000):
        yield b" " * 100_000


async def test_a_body_that_is_too_large_is_refused_before_it_is_sent() -> None:
    async with serving(ScriptedFrontDoor()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: 10000000\r\n\r\n".encode())
        async with asyncio.timeout(1):
            assert b" 413 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_a_taken_port_is_one_clear_sentence() -> None:
    async with serving(ScriptedFrontDoor()) as port:
        second = HttpServer(create_app(ScriptedFrontDoor(), vocabulary=VOCABULARY))
        expected = f"^address 127.0.0.1:{port} is in use by another process; choose another with --web$"
        with pytest.raises(StartupError, match=expected):
            await second.start("127.0.0.1", port, flag="--web")


async def test_an_address_of_another_machine_is_one_clear_sentence() -> None:
    server = HttpServer(create_app(ScriptedFrontDoor(), vocabulary=VOCABULARY))
    with pytest.raises(StartupError, match=r"^cannot listen on 192.0.2.1:0: .+; choose another with --http$"):
        await server.start("192.0.2.1", 0)


async def test_the_port_can_be_had_again_after_stop() -> None:
    front_door = ScriptedFrontDoor(started(), finished())
    async with serving(front_door) as port, httpx.AsyncClient() as client:
        await client.post(f"http://127.0.0.1:{port}{CHAT}", content=body(False))
    again = HttpServer(create_app(front_door, vocabulary=VOCABULARY))
    assert await again.start("127.0.0.1", port) == port
    await again.stop(0)
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        pass


async def test_signals_are_left_to_the_process() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with serving(ScriptedFrontDoor()):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


async def test_stop_waits_for_requests_within_its_grace() -> None:
    gate = asyncio.Event()
    front_door = ScriptedFrontDoor(started(), chunk("abc"), gate, chunk("def"), finished())
    server = HttpServer(create_app(front_door, vocabulary=VOCABULARY))
    port = await server.start("127.0.0.1", 0)
    async with asking(port, body(True)) as reader:
        await reader.readuntil(b"abc")
        stopping = asyncio.create_task(server.stop(SOON_S))
        await asyncio.sleep(0)
        gate.set()
        assert b"[DONE]" in await reader.read()
        await stopping
    assert front_door.num_cancelled == 0


@pytest.mark.parametrize("begun", [False, True])
async def test_what_is_left_after_the_grace_is_told_and_cancelled(begun: bool) -> None:
    front_door = ScriptedFrontDoor(started(), *([chunk("abc")] if begun else []), asyncio.Event())
    server = HttpServer(create_app(front_door, vocabulary=VOCABULARY))
    port = await server.start("127.0.0.1", 0)
    async with asking(port, body(True)) as reader:
        await front_door.waiting.wait()
        await server.stop(0.05)
        assert front_door.num_running == 0
        answer = await reader.read()
    assert (b" 503 " in answer, b"[DONE]" in answer) == (not begun, False)
    assert b"the gateway is shutting down" in answer
    assert (front_door.num_running, front_door.num_cancelled) == (0, 1)
