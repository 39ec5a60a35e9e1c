"""The limit: the same copies within one process, between two regions of the kind that the transport moves."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from tests.bench.transport.native import load, scattered_copy
from tests.bench.transport.pages import kind_of_pages
from tests.bench.transport.pattern import U8
from tests.bench.transport.sides.base import Stamps
from transport import create


class MemcpySide:
    def __init__(self, num_blocks: int, nbytes: int) -> None:
        self._transport = create("ucx")
        self._regions = {role: self._transport.allocate(num_blocks * nbytes) for role in ("target", "initiator")}
        self._shape = (num_blocks, nbytes)
        load()

    def pool(self, role: str) -> U8:
        return np.frombuffer(self._regions[role].view, dtype=np.uint8).reshape(self._shape)

    def describe(self) -> str:
        return kind_of_pages(self._regions["target"].address)

    def connect(self, description: str) -> str:
        raise NotImplementedError("memcpy has both pools in one process")

    def run(self, op: str, local: Sequence[int], remote: Sequence[int]) -> Stamps:
        source, to = ("initiator", "target") if op == "write" else ("target", "initiator")
        nbytes = self._shape[1]
        offsets = {"initiator": np.asarray(local, np.uint64) * nbytes, "target": np.asarray(remote, np.uint64) * nbytes}
        addresses = (self._regions[to].address, self._regions[source].address)
        began_ns = time.monotonic_ns()
        scattered_copy(*addresses, offsets[to], offsets[source], nbytes)
        ended_ns = time.monotonic_ns()
        return Stamps(began_ns, ended_ns, ended_ns)
