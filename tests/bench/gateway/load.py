"""Clients of a gateway: so many streams at once, counted and timed for a while.  Says "open" when
all are, "begin" and "end" around the while, then one line of JSON.

python -m tests.bench.gateway.load ADDRESS STREAMS WARM_S MEASURE_S
"""

from __future__ import annotations

import json
import selectors
import sys
import time
from dataclasses import dataclass, field

from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2
from tests.bench.gateway.stamps import age_s
from tests.bench.gateway.wire import Connection

GENERATE = "/kvferry.api.inference.v1.InferenceService/Generate"
# Short enough that the decode worker computes it.
PROMPT = [10, 11, 12, 13]
NUM_CONNECTIONS = 8
OPEN_INTERVAL_S = 0.001
OPEN_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Tally:
    num_tokens: int = 0
    num_messages: int = 0
    latencies_s: list[float] = field(default_factory=list)

    def take(self, message: bytes) -> None:
        now_s = time.monotonic()
        tokens = inference_pb2.GenerateResponse.FromString(message).chunk.tokens
        self.count([age_s(token.id, now_s) for token in tokens])

    def count(self, ages_s: list[float]) -> None:
        """The tokens of one message."""
        self.num_messages += 1
        self.num_tokens += len(ages_s)
        self.latencies_s += ages_s

    def found(self, seconds: float) -> dict[str, float]:
        found = sorted(self.latencies_s)
        return {
            "tokens_per_s": self.num_tokens / seconds,
            "messages_per_s": self.num_messages / seconds,
            "p50_ms": 1e3 * found[len(found) // 2],
            "p99_ms": 1e3 * found[len(found) * 99 // 100],
        }


class Clients:
    def __init__(self, address: str) -> None:
        self._connections = [Connection(address, GENERATE) for _ in range(NUM_CONNECTIONS)]
        self._selector = selectors.DefaultSelector()
        self._speaking: set[tuple[int, int]] = set()  # streams that something came from
        for number, connection in enumerate(self._connections):
            self._selector.register(connection.socket, selectors.EVENT_READ, number)

    def open(self, num_streams: int) -> None:
        """Returns when each has had its first message.  Raises TimeoutError."""
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=PROMPT),
            sampling=common_pb2.SamplingParams(temperature=0, ignore_eos=True),
        ).SerializeToString()
        began_s = time.monotonic()
        for number in range(num_streams):
            self._connections[number % NUM_CONNECTIONS].open(request)
            self.read(time.monotonic() + OPEN_INTERVAL_S, None)
        while len(self._speaking) < num_streams:
            if time.monotonic() > began_s + OPEN_TIMEOUT_S:
                raise TimeoutError(f"only {len(self._speaking)} of {num_streams} streams were answered")
            self.read(time.monotonic() + 0.1, None)

    def read(self, until_s: float, tally: Tally | None) -> None:
        while (left_s := until_s - time.monotonic()) > 0:
            for key, _ in self._selector.select(left_s):
                for stream, message in self._connections[key.data].receive():
                    if tally is not None:
                        tally.take(message)
                    else:
                        self._speaking.add((key.data, stream))


def load(address: str, num_streams: int, warm_s: float, measure_s: float) -> dict[str, float]:
    clients = Clients(address)
    clients.open(num_streams)
    print("open", flush=True)
    clients.read(time.monotonic() + warm_s, None)
    tally = Tally()
    print("begin", flush=True)
    began_s = time.monotonic()
    clients.read(began_s + measure_s, tally)
    seconds = time.monotonic() - began_s
    print("end", flush=True)
    return tally.found(seconds)


def main() -> None:
    address, num_streams, warm_s, measure_s = sys.argv[1:]
    print(json.dumps(load(address, int(num_streams), float(warm_s), float(measure_s))), flush=True)


if __name__ == "__main__":
    main()
