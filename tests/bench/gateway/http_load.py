"""Clients of an OpenAI API: so many streams of chat at once, each on a connection of its own, counted and timed as
``load`` does those of gRPC.

python -m tests.bench.gateway.http_load ADDRESS STREAMS WARM_S MEASURE_S MODEL
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time

from services.engine.model_files import open_model
from tests.bench.gateway.load import OPEN_INTERVAL_S, OPEN_TIMEOUT_S, Tally
from tests.bench.gateway.words import Words

RECEIVE_NBYTES = 1 << 16
# More than are sent while it is measured, and within the model's context.
MAX_TOKENS = 7000
CONTENT = re.compile(rb'"content": ?"([^"]*)"')


class Stream:
    """An answer as it comes.  Its chunks' framing is not looked at: an event is found by what it begins and ends with."""

    def __init__(self, address: str, request: bytes) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(request)
        self._rest = b""

    def receive(self) -> list[bytes]:
        """The texts of the events that have come.  Raises RuntimeError when the answer ends."""
        got = self.socket.recv(RECEIVE_NBYTES)
        data = self._rest + got
        if not got or (data.startswith(b"HTTP/") and b"\r\n\r\n" in data and b" 200 " not in data[:32]):
            raise RuntimeError(f"an answer ended: {data[-500:]!r}")
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            self._rest = data
            return []
        self._rest = data[end:]
        return [text for text in CONTENT.findall(data[:end]) if text]


class Clients:
    def __init__(self, address: str, model: str) -> None:
        self._address = address
        self._selector = selectors.DefaultSelector()
        self._speaking: set[int] = set()
        body = json.dumps({
            "model": model, "messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": MAX_TOKENS,
        })  # fmt: skip
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
        self._request = f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()

    def open(self, num_streams: int) -> None:
        """Returns when each has had its first word.  Raises TimeoutError."""
        began_s = time.monotonic()
        for number in range(num_streams):
            stream = Stream(self._address, self._request)
            self._selector.register(stream.socket, selectors.EVENT_READ, (number, stream))
            self.read(time.monotonic() + OPEN_INTERVAL_S, None, None)
        while len(self._speaking) < num_streams:
            if time.monotonic() > began_s + OPEN_TIMEOUT_S:
                raise TimeoutError(f"only {len(self._speaking)} of {num_streams} streams were answered")
            self.read(time.monotonic() + 0.1, None, None)

    def read(self, until_s: float, tally: Tally | None, words: Words | None) -> None:
        while (left_s := until_s - time.monotonic()) > 0:
            for key, _ in self._selector.select(left_s):
                number, stream = key.data
                for text in stream.receive():
                    if tally is None or words is None:
                        self._speaking.add(number)
                        continue
                    now_s = time.monotonic()
                    tally.count([words.age_s(word, now_s) for word in text.split()])


def load(address: str, num_streams: int, warm_s: float, measure_s: float, model: str) -> dict[str, float]:
    words, clients = Words(open_model(model)), Clients(address, model)
    clients.open(num_streams)
    print("open", flush=True)
    clients.read(time.monotonic() + warm_s, None, None)
    tally = Tally()
    print("begin", flush=True)
    began_s = time.monotonic()
    clients.read(began_s + measure_s, tally, words)
    seconds = time.monotonic() - began_s
    print("end", flush=True)
    return tally.found(seconds)


def main() -> None:
    address, num_streams, warm_s, measure_s, model = sys.argv[1:]
    print(json.dumps(load(address, int(num_streams), float(warm_s), float(measure_s), model)), flush=True)


if __name__ == "__main__":
    main()
