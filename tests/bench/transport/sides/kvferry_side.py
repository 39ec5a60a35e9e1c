"""This repository's transport, by its public interface."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from tests.bench.transport.pattern import U8
from tests.bench.transport.sides.base import Stamps
from transport import Op, create

TIMEOUT_S = 60
PAGE = 4096


class KvferrySide:
    def __init__(self, num_blocks: int, nbytes: int) -> None:
        self._transport = create("ucx")
        began = time.monotonic()
        self.region = self._transport.allocate(num_blocks * nbytes)
        # A pool is ready when writing into it costs no fault, wherever the transport makes its pages.
        np.frombuffer(self.region.view, dtype=np.uint8)[::PAGE] = 0
        self.allocation_s = time.monotonic() - began
        self._shape = (num_blocks, nbytes)

    def pool(self, role: str) -> U8:
        return np.frombuffer(self.region.view, dtype=np.uint8).reshape(self._shape)

    def describe(self) -> str:
        return self.region.descriptor.hex()

    def connect(self, description: str) -> str:
        began = time.monotonic()
        self._remote = self._transport.open(bytes.fromhex(description))
        self.opening_s = time.monotonic() - began
        return ""

    def path(self) -> str:
        """How the bytes go: "mapped" or "rma"."""
        return self._remote.path

    def run(self, op: str, local: Sequence[int], remote: Sequence[int]) -> Stamps:
        nbytes = self._shape[1]
        kind = Op.WRITE if op == "write" else Op.READ
        here, there = np.asarray(local, np.uint64) * nbytes, np.asarray(remote, np.uint64) * nbytes
        began_ns = time.monotonic_ns()
        transfer = self._transport.post(kind, self.region, self._remote, here, there, nbytes)
        posted_ns = time.monotonic_ns()
        transfer.wait(TIMEOUT_S)
        return Stamps(began_ns, posted_ns, time.monotonic_ns())
