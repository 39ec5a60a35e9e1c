"""Mooncake's transfer engine over TCP, by its own Python API; no metadata server, the peers shake hands."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from mooncake.engine import TransferEngine

from tests.bench.transport.pages import private_pool
from tests.bench.transport.pattern import U8
from tests.bench.transport.sides.base import Stamps

HOST = "127.0.0.1"


class MooncakeSide:
    def __init__(self, num_blocks: int, nbytes: int) -> None:
        self._engine = TransferEngine()
        check("start", self._engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""))
        self._pool = private_pool(num_blocks, nbytes)
        self._base = self._pool.ctypes.data
        self._nbytes = nbytes
        check("register the pool", self._engine.register_memory(self._base, self._pool.nbytes))

    def pool(self, role: str) -> U8:
        return self._pool

    def describe(self) -> str:
        return json.dumps([f"{HOST}:{self._engine.get_rpc_port()}", self._base])

    def connect(self, description: str) -> str:
        self._peer, self._there = json.loads(description)
        return ""

    def run(self, op: str, local: Sequence[int], remote: Sequence[int]) -> Stamps:
        here = [self._base + i * self._nbytes for i in local]
        there = [self._there + i * self._nbytes for i in remote]
        sizes = [self._nbytes] * len(here)
        transfer = self._engine.batch_transfer_sync_write if op == "write" else self._engine.batch_transfer_sync_read
        began_ns = time.monotonic_ns()
        status = transfer(self._peer, here, there, sizes)
        ended_ns = time.monotonic_ns()
        check(op, status)
        return Stamps(began_ns, ended_ns, ended_ns)


def check(what: str, status: int) -> None:
    if status != 0:
        raise RuntimeError(f"Mooncake could not {what}: status {status}")
