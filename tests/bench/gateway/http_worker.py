"""An OpenAI API that computes nothing, for routers that pass HTTP on: each stream is sent a word a step, in an event of its
own.  The words say when they were drawn.

python -m tests.bench.gateway.http_worker ADDRESS MODEL GROUPS

A group speaks at once, as the streams of one engine do.  Its input sets the pace as it sets the null workers'.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time

from services.engine.model_files import open_model
from services.runtime.server import run_until_stopped
from tests.bench.gateway.null_workers import Pace
from tests.bench.gateway.words import Words

_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"%b","choices":'
    b'[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n'
)


class Engine:
    def __init__(self, model: str, words: Words, pace: Pace, num_groups: int) -> None:
        self.model = model
        self._words = words
        self._pace = pace
        self._groups: list[set[asyncio.Transport]] = [set() for _ in range(num_groups)]
        self._num_streams = 0

    def add(self, transport: asyncio.Transport) -> None:
        self._groups[self._num_streams % len(self._groups)].add(transport)
        self._num_streams += 1

    def remove(self, transport: asyncio.Transport) -> None:
        for group in self._groups:
            group.discard(transport)

    async def run(self, number: int) -> None:
        while True:
            await self._pace.step(number / len(self._groups))
            event = _EVENT % (self.model.encode(), self._words.text(time.monotonic()))
            chunk = b"%x\r\n%b\r\n" % (len(event), event)
            for transport in tuple(self._groups[number]):
                transport.write(chunk)


class Connection(asyncio.Protocol):
    """One request after the other; a stream has no end but the connection's."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._engine.remove(self._transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        if len(rest) < length:
            return
        self._received = rest[length:]
        if b"/v1/chat/completions" in head.split(b"\r\n")[0]:
            self._transport.write(_STREAM)
            self._engine.add(self._transport)
            return
        body = json.dumps({
            "status": "ready", "model_path": self._engine.model, "served_model_name": self._engine.model, "object": "list",
            "data": [{"id": self._engine.model, "object": "model", "owned_by": "null"}],
        }).encode()  # fmt: skip
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)


async def serve(address: str, model: str, num_groups: int) -> None:
    pace = Pace()
    threading.Thread(target=pace.follow, args=(sys.stdin,), daemon=True).start()
    engine = Engine(model, Words(open_model(model)), pace, num_groups)
    host, _, port = address.rpartition(":")
    server = await asyncio.get_running_loop().create_server(lambda: Connection(engine), host, int(port), backlog=2048)
    async with server, asyncio.TaskGroup() as speaking:
        for number in range(num_groups):
            speaking.create_task(engine.run(number))
        print("ready", flush=True)


def main() -> int:
    address, model, num_groups = sys.argv[1:]
    return run_until_stopped(serve(address, model, int(num_groups)), prog="http_worker")


if __name__ == "__main__":
    sys.exit(main())
