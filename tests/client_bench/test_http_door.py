"""kvferry bench over HTTP: the gateway's own HTTP server, and one that knows none of vLLM's fields."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from contextlib import aclosing
from pathlib import Path

import pytest

from kvferry import errors
from kvferry.bench.doors import Target
from kvferry.bench.http_door import HttpDoor, open_http_door
from tests.certificates import make_authority
from tests.gateway.scripted import MODEL, ScriptedFrontDoor, Step, chunk, finished, started
from tests.gateway.test_http_server import serving

PLAIN = b"""HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n\
data: {"choices": [{"text": "a"}]}\n\n: a comment\n\ndata: {"choices": [{"text": ""}]}\n\n\
data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n"""


async def counts(door: HttpDoor) -> list[int]:
    async with aclosing(door.stream([5, 6], 4, 5.0)) as answer:
        return [num_tokens async for num_tokens in answer]


async def test_each_message_has_its_tokens() -> None:
    front_door = ScriptedFrontDoor(started(), chunk("ab"), chunk("", [200]), chunk("c"), finished())
    async with serving(front_door) as port, open_http_door(f"http://127.0.0.1:{port}/v1", None, None, "", 4) as door:
        assert await door.target() == Target(MODEL, front_door.model.context_length, 32_000)
        # The token without text is told with the next one that has some, and the usage at the end counts one more.
        assert await counts(door) == [2, 2, 1]
    [request] = front_door.requests
    assert (list(request.token_ids.ids), request.sampling.max_tokens, request.sampling.ignore_eos) == ([5, 6], 4, True)


@pytest.mark.parametrize(
    ("script", "kind", "reason"),
    [
        ([errors.OverloadedError("full", retry_after_s=3)], errors.OverloadedError, "OVERLOADED"),
        (
            [started(), chunk("a"), errors.UnavailableError("lost", reason="LOST")],
            errors.InternalError,
            "LOST",
        ),
    ],
)
async def test_failures_before_and_within_an_answer(script: list[Step], kind: type[errors.Error], reason: str) -> None:
    async with (
        serving(ScriptedFrontDoor(*script)) as port,
        open_http_door(f"http://127.0.0.1:{port}/v1", None, None, "", 4) as door,
    ):
        await door.target()
        with pytest.raises(kind) as raised:
            await counts(door)
    assert raised.value.reason == reason
    assert kind is not errors.OverloadedError or raised.value.retry_after_s == 3


@pytest.mark.parametrize("whole", [True, False])
async def test_a_server_that_tells_its_counts_only_at_the_end(whole: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(PLAIN + (b"data: [DONE]\n\n" if whole else b""))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with open_http_door(f"http://127.0.0.1:{port}/v1/", None, None, "some", 4) as door:
            if whole:
                assert await counts(door) == [1, 2]
            else:
                with pytest.raises(errors.UnavailableError, match="broke off"):
                    await counts(door)


async def test_tls_with_an_authority_that_is_trusted_and_one_that_is_not(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(PLAIN + b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    folder = make_authority(tmp_path / "certificates")
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(folder / "gateway.pem", folder / "gateway.key")
    (no_certificates := tmp_path / "none.pem").write_text("")
    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=own) as server:
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}/v1"
        async with open_http_door(url, None, folder / "ca.pem", "some", 4) as door:
            assert await counts(door) == [1, 2]
        async with open_http_door(url, None, None, "some", 4) as door:
            with pytest.raises(errors.UnavailableError, match="certificate"):
                await counts(door)
        with pytest.raises(errors.InvalidRequestError, match=r"none\.pem"):
            async with open_http_door(url, None, no_certificates, "some", 4):
                pass


async def test_the_command_over_http(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    async with serving(ScriptedFrontDoor(started(), chunk("abcde"), finished())) as port:
        asked = ["bench", "--http", f"http://127.0.0.1:{port}/v1", "--concurrency", "1", "--requests", "1"]
        command = await asyncio.create_subprocess_exec(sys.executable, "-m", "kvferry.cli", *asked, "--json", str(out))
        assert await asyncio.wait_for(command.wait(), 60) == 0
    report = json.loads(out.read_text())
    assert (report["num_completed"], report["max_open"]) == (1, 1)
    assert report["ttft"]["p50"] > 0
