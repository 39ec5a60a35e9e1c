"""One process of a measured pair: ``python -m tests.bench.transport.side LIBRARY {target,initiator} BLOCKS NBYTES``.

Speaks JSON lines on stdin and stdout.  Each library runs in processes of its own: two builds of UCX in one process hang.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]


class Side(Protocol):
    """A pool of ``num_blocks`` blocks, and one-sided batches against the peer's."""

    pool: U8  # [num_blocks, nbytes]

    def describe(self) -> str: ...

    def connect(self, description: str) -> str:
        """Returns what the peer must be told in its turn, or nothing."""
        ...

    def run(self, op: str, local: list[int], remote: list[int]) -> float:
        """Seconds from posting the batch until every byte is in place."""
        ...


class KvferrySide:
    def __init__(self, num_blocks: int, nbytes: int) -> None:
        from transport import create

        self._transport = create("ucx")
        self._region = self._transport.allocate(num_blocks * nbytes)
        self._nbytes = nbytes
        self.pool = np.frombuffer(self._region.view, dtype=np.uint8).reshape(num_blocks, nbytes)

    def describe(self) -> str:
        return self._region.descriptor.hex()

    def connect(self, description: str) -> str:
        self._remote = self._transport.open(bytes.fromhex(description))
        return ""

    def run(self, op: str, local: list[int], remote: list[int]) -> float:
        from transport import Op

        here = np.asarray(local, dtype=np.uint64) * self._nbytes
        there = np.asarray(remote, dtype=np.uint64) * self._nbytes
        began = time.perf_counter()
        kind = Op.WRITE if op == "write" else Op.READ
        self._transport.post(kind, self._region, self._remote, here, there, self._nbytes).wait(60)
        return time.perf_counter() - began


class NixlSide:
    def __init__(self, num_blocks: int, nbytes: int) -> None:
        from nixl_cu13 import nixl_agent, nixl_agent_config

        self._name = f"side-{time.monotonic_ns()}"
        self._agent = nixl_agent(self._name, nixl_agent_config(backends=["UCX"]))
        self.pool = np.zeros((num_blocks, nbytes), dtype=np.uint8)
        self._base = self.pool.ctypes.data
        self._nbytes = nbytes
        self._agent.register_memory([(self._base, self.pool.nbytes, 0, "pool")], "DRAM")

    def describe(self) -> str:
        return json.dumps([self._base, self._agent.get_agent_metadata().hex()])

    def connect(self, description: str) -> str:
        self._there, metadata = json.loads(description)
        self._peer = self._agent.add_remote_agent(bytes.fromhex(metadata))
        return self.describe()

    def run(self, op: str, local: list[int], remote: list[int]) -> float:
        def blocks(base: int, indices: list[int]) -> Any:
            rows = [(base + i * self._nbytes, self._nbytes, 0) for i in indices]
            return self._agent.get_xfer_descs(rows, "DRAM")

        here, there = blocks(self._base, local), blocks(self._there, remote)
        handle = self._agent.initialize_xfer(op.upper(), here, there, self._peer)
        began = time.perf_counter()
        state = self._agent.transfer(handle)
        while state != "DONE":
            if state == "ERR":
                raise RuntimeError("NIXL: the transfer failed")
            state = self._agent.check_xfer_state(handle)
        seconds = time.perf_counter() - began
        self._agent.release_xfer_handle(handle)
        return seconds


LIBRARIES: dict[str, type[KvferrySide] | type[NixlSide]] = {"kvferry": KvferrySide, "nixl": NixlSide}


def main() -> None:
    library, num_blocks, nbytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    side: Side = LIBRARIES[library](num_blocks, nbytes)
    for line in sys.stdin:
        command = json.loads(line)
        match command.pop("do"):
            case "describe":
                answer: Any = side.describe()
            case "connect":
                answer = side.connect(command["description"])
            case "fill":
                side.pool[:] = (np.arange(num_blocks, dtype=np.uint32) * 7 + command["salt"])[:, None].astype(np.uint8)
                answer = None
            case "sums":
                answer = side.pool[command["blocks"]].astype(np.uint64).sum(axis=1).tolist()
            case "run":
                answer = side.run(**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
