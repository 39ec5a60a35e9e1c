"""A worker that pulls cached blocks from another, reduced to its pins and reads: a real process, to be killed.

It obeys lines on its standard input and answers each with one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from transport import Op, Transport, create

ROOT = Path(__file__).parents[2]


def digests(transport: Transport, descriptor: bytes, blocks: list[int], nbytes: int) -> list[str]:
    """Of the bytes of each block, read one-sidedly."""
    with transport.allocate(len(blocks) * nbytes) as region:
        with transport.open(descriptor) as remote:
            here = [i * nbytes for i in range(len(blocks))]
            transport.post(Op.READ, region, remote, here, [b * nbytes for b in blocks], nbytes).wait(10)
        return [hashlib.sha256(bytes(region.view[i : i + nbytes])).hexdigest() for i in here]


@dataclass(frozen=True, slots=True)
class Pinned:
    pin_id: str
    blocks: list[int]
    expires_in_ms: int
    asked_s: float  # time.monotonic(), which all processes of one host share


class ReaderProcess:
    """A reader of one incarnation.  A context manager; ``kill`` it at any time."""

    def __init__(self, address: str, owner_incarnation: int, incarnation: int) -> None:
        command = [sys.executable, "-m", "tests.integration.reader", address, str(owner_incarnation), str(incarnation)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()

    def pin(self, hashes: bytes) -> Pinned:
        return Pinned(**self._ask(hashes=hashes.hex()))

    def read(self) -> list[str]:
        """Digests of the blocks pinned last."""
        answer: list[str] = self._ask()
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def _ask(self, **request: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def serve(address: str, owner_incarnation: int, incarnation: int) -> None:
    pinned = worker_pb2.PinBlocksResponse()
    with grpc.insecure_channel(address) as channel, create("ucx") as transport:
        owner = worker_pb2_grpc.WorkerServiceStub(channel)
        for line in sys.stdin:
            request = json.loads(line)
            if "hashes" in request:
                asked_s = time.monotonic()
                pinned = owner.PinBlocks(
                    worker_pb2.PinBlocksRequest(
                        hashes=bytes.fromhex(request["hashes"]),
                        reader_id="reader",
                        reader_incarnation=incarnation,
                        owner_incarnation=owner_incarnation,
                    ),
                    timeout=10,
                )
                answer: Any = asdict(Pinned(pinned.pin_id, list(pinned.blocks), pinned.expires_in_ms, asked_s))
            else:
                answer = digests(transport, pinned.region, list(pinned.blocks), pinned.layout.block_nbytes)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
