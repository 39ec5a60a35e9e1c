"""One process of a measured pair: ``python -m tests.bench.transport.side LIBRARY {target,initiator} BLOCKS NBYTES``.

Speaks JSON lines on stdin and stdout.  Each library runs in processes of its own: two builds of UCX in one process hang.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.bench.transport import pattern
from tests.bench.transport.counting import Counter
from tests.bench.transport.native import load, watch
from tests.bench.transport.peers import KVFERRY, MEMCPY, MOONCAKE, NIXL, NIXL_LEAN
from tests.bench.transport.sides.base import Side


def create(library: str, role: str, num_blocks: int, nbytes: int) -> Side:
    if library == KVFERRY.name:
        from tests.bench.transport.sides.kvferry_side import KvferrySide

        return KvferrySide(num_blocks, nbytes)
    if library == MEMCPY.name:
        from tests.bench.transport.sides.memcpy_side import MemcpySide

        return MemcpySide(num_blocks, nbytes)
    if library == MOONCAKE.name:
        from tests.bench.transport.sides.mooncake_side import MooncakeSide

        return MooncakeSide(num_blocks, nbytes)
    if library in (NIXL.name, NIXL_LEAN.name):
        from tests.bench.transport.sides.nixl_side import NixlSide

        return NixlSide(num_blocks, nbytes, has_progress_thread=library == NIXL.name or role == "target")
    raise ValueError(f"no library is called {library}")


class Commands:
    """What the controlling process may ask, by name."""

    def __init__(self, side: Side) -> None:
        self._side: Any = side  # path and times of pools are kvferry's alone
        load()

    def describe(self) -> Any:
        return self._side.describe()

    def connect(self, description: str) -> Any:
        return self._side.connect(description)

    def path(self) -> Any:
        return self._side.path()

    def allocation_s(self) -> Any:
        return self._side.allocation_s

    def opening_s(self) -> Any:
        return self._side.opening_s

    def fill(self, role: str, salt: int, blocks: Sequence[int] | None = None) -> None:
        pattern.fill(self._side.pool(role), salt, blocks)

    def num_wrong(self, role: str, arrivals: Sequence[dict[str, Any]], salt: int | None = None) -> int:
        return pattern.num_wrong(self._side.pool(role), [pattern.Arrival(**a) for a in arrivals], salt)

    def run(self, op: str, local: Sequence[int], remote: Sequence[int], at_ns: int = 0) -> dict[str, int]:
        """Not before ``at_ns`` on the common clock."""
        time.sleep(max(0, at_ns - time.monotonic_ns()) / 1e9)
        return dataclasses.asdict(self._side.run(op, local, remote))

    def run_each(self, op: str, local: Sequence[int], remote: Sequence[int], pause_s: float) -> list[dict[str, int]]:
        """One block after the other, with a pause before each."""
        stamps = []
        for here, there in zip(local, remote, strict=True):
            time.sleep(pause_s)
            stamps.append(dataclasses.asdict(self._side.run(op, [here], [there])))
        return stamps

    def watch_each(self, blocks: Sequence[int], words: Sequence[int]) -> list[int]:
        """When the last eight bytes of each of the target's blocks, in turn, were first seen to be its word; takes a core
        until then."""
        ends = [self._side.pool("target")[block, -8:].ctypes.data for block in blocks]
        return [watch(end, word, timeout_s=5) for end, word in zip(ends, words, strict=True)]

    def counting(self, local: Sequence[int], remote: Sequence[int], alone_s: float) -> list[float]:
        """Millions of counts per second of a Python thread: while this one sleeps, and while it posts a batch and waits."""
        here, there = np.asarray(local, np.uint64), np.asarray(remote, np.uint64)
        with Counter() as counter:
            alone = counter.rate_during(lambda: time.sleep(alone_s))
            beside = counter.rate_during(lambda: self._side.run("write", here, there))
        return [alone / 1e6, beside / 1e6]


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the libraries' own words are no answers
    library, role, num_blocks, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    commands = Commands(create(library, role, num_blocks, nbytes))
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(commands, command.pop("do"))(**command)), file=answers, flush=True)


if __name__ == "__main__":
    main()
