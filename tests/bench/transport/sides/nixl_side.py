"""NIXL over UCX, by its own Python API.  Building the request is not measured, posting it and its end are."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

from nixl_cu13 import nixl_agent, nixl_agent_config

from tests.bench.transport.pages import private_pool
from tests.bench.transport.pattern import U8
from tests.bench.transport.sides.base import Stamps


class NixlSide:
    def __init__(self, num_blocks: int, nbytes: int, *, has_progress_thread: bool) -> None:
        config = nixl_agent_config(enable_prog_thread=has_progress_thread, backends=["UCX"])
        self._agent = nixl_agent(f"side-{os.getpid()}", config)
        self._pool = private_pool(num_blocks, nbytes)
        self._base = self._pool.ctypes.data
        self._nbytes = nbytes
        self._agent.register_memory([(self._base, self._pool.nbytes, 0, "pool")], "DRAM")

    def pool(self, role: str) -> U8:
        return self._pool

    def describe(self) -> str:
        return json.dumps([self._base, self._agent.get_agent_metadata().hex()])

    def connect(self, description: str) -> str:
        self._there, metadata = json.loads(description)
        self._peer = self._agent.add_remote_agent(bytes.fromhex(metadata))
        return self.describe()

    def run(self, op: str, local: Sequence[int], remote: Sequence[int]) -> Stamps:
        here, there = self._blocks(self._base, local), self._blocks(self._there, remote)
        handle = self._agent.initialize_xfer(op.upper(), here, there, self._peer)
        began_ns = time.monotonic_ns()
        state = self._agent.transfer(handle)
        posted_ns = time.monotonic_ns()
        while state != "DONE":
            if state == "ERR":
                raise RuntimeError("NIXL: the transfer failed")
            state = self._agent.check_xfer_state(handle)
        ended_ns = time.monotonic_ns()
        self._agent.release_xfer_handle(handle)
        return Stamps(began_ns, posted_ns, ended_ns)

    def _blocks(self, base: int, indices: Sequence[int]) -> Any:
        return self._agent.get_xfer_descs([(base + i * self._nbytes, self._nbytes, 0) for i in indices], "DRAM")
