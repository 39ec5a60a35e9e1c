"""Digests of a pool that the host cannot look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvferry.api.common.v1 import common_pb2
from services.engine.digest import digest_blocks
from services.worker.digester import Digester
from tests.worker.tiny import LAYOUT, NUM_BLOCKS, make_worker
from transport import create


@dataclass(frozen=True, slots=True)
class GpuRegion:
    content: bytes
    device: int = 0

    def fetch(self, offsets: Sequence[int], size: int) -> memoryview:
        return memoryview(b"".join(self.content[offset : offset + size] for offset in offsets))


async def test_blocks_of_a_gpu_are_digested_as_those_of_the_host() -> None:
    content = bytes(i * 7 % 251 for i in range(NUM_BLOCKS * LAYOUT.block_nbytes))
    with create("loopback") as transport:
        worker = make_worker(transport, "decode-0", common_pb2.WORKER_ROLE_DECODE)
        region: Any = GpuRegion(content)
        worker.region = region
        with Digester(worker) as digester:
            found = await digester.digest((5, 2, 11), first_index=1, num_prompt_tokens=14)
    assert found == digest_blocks(memoryview(content), LAYOUT, (5, 2, 11), 1, 14)
