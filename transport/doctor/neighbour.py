"""One of a trial's two processes: ``python -m transport.doctor.neighbour BLOCKS NBYTES``.

Obeys lines of JSON on its standard input until that ends, and answers each with one: {"answer": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from transport import Op, Region, Transport, create
from transport.ucp import memcpy, ucx_version

BATCH_TIMEOUT_S = 20.0


class Neighbour:
    """A pool of ``num_blocks`` blocks; half of them are moved in each round, scattered."""

    def __init__(self, transport: Transport, num_blocks: int, nbytes: int) -> None:
        self._transport = transport
        self._num_blocks, self._nbytes = num_blocks, nbytes
        self._copies: Region | None = None

    def allocate(self) -> dict[str, Any]:
        self._pool = self._transport.allocate(self._num_blocks * self._nbytes)
        return {"descriptor": self._pool.descriptor.hex(), "huge_pages": self._pool.huge_pages}

    def open(self, descriptor: str) -> dict[str, Any]:
        self._remote = self._transport.open(bytes.fromhex(descriptor))
        return {"path": self._remote.path, "why_not_mapped": self._remote.why_not_mapped}

    def fill(self, salt: int) -> None:
        """Every word of every block differs from its neighbours, and from those of another salt."""
        row = np.random.default_rng(salt).integers(1 << 63, size=self._nbytes // 8, dtype=np.uint64)
        np.add(row, np.arange(self._num_blocks, dtype=np.uint64)[:, None], out=self._words())

    def digest(self, side: str) -> int:
        """Of the blocks that are moved on that side, in order."""
        words, crc = self._words(), 0
        for block in self._blocks(side):
            crc = zlib.crc32(words[block], crc)
        return crc

    def run(self, op: str, seconds: float) -> dict[str, Any]:
        """Seconds of each round's batch, and of copying the same blocks within this process right before it."""
        if self._copies is None:
            self._copies = self._transport.allocate(self._pool.nbytes)
        copies, pool, size = self._copies, self._pool, self._nbytes
        local, remote = self._blocks("local") * size, self._blocks("remote") * size

        def copy() -> None:
            memcpy(copies, pool, remote, local, size)

        def batch() -> None:
            self._transport.post(Op(op), pool, self._remote, local, remote, size).wait(BATCH_TIMEOUT_S)

        copy()  # once untimed, each: the first touches pages
        batch()
        until = time.monotonic() + seconds
        copying: list[float] = []
        moving: list[float] = []
        while not moving or time.monotonic() < until:
            copying.append(_timed(copy))
            moving.append(_timed(batch))
        return {"copying": copying, "moving": moving}

    def _blocks(self, side: str) -> npt.NDArray[np.int64]:
        """Which ones are moved on that side, in order: the same in both processes."""
        seed = {"local": 1, "remote": 2}[side]
        return np.random.default_rng(seed).permutation(self._num_blocks)[: self._num_blocks // 2]

    def _words(self) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self._pool.view, np.uint64).reshape(self._num_blocks, -1)


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        neighbour = Neighbour(create("ucx"), int(sys.argv[1]), int(sys.argv[2]))
        for line in sys.stdin:
            request = json.loads(line)
            match request.pop("do"):
                case "tell_version":
                    say(answer=ucx_version())
                case "allocate":
                    say(answer=neighbour.allocate())
                case "open":
                    say(answer=neighbour.open(**request))
                case "fill":
                    neighbour.fill(**request)
                    say(answer=None)
                case "run":
                    say(answer=neighbour.run(**request))
                case "digest":
                    say(answer=neighbour.digest(**request))
    except Exception as e:  # told by the process that asked, whatever it is
        say(error=str(e) or type(e).__name__)


if __name__ == "__main__":
    main()
