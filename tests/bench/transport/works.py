"""What is measured, and how good is good enough."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from tests.bench.transport import allocation, bandwidth, latency, posting, writers
from tests.bench.transport.peers import MEMCPY, MOONCAKE, NIXL, NIXL_LEAN, Library
from tests.bench.transport.rows import Row

Work = Callable[[int], Sequence[Row]]  # of the number of rounds

TCP = {"UCX_TLS": "tcp,self"}
SMOLLM2_BLOCK = 737_280  # 16 tokens of SmolLM2-135M in float32, all layers, keys and values


def works(missing: Collection[Library]) -> Mapping[str, Work]:
    """By name.  Peers that are ``missing`` are left out."""

    def bandwidth_of(
        op: str, num_blocks: int, nbytes: int, goals: Mapping[Library, float], env: Mapping[str, str] | None = None
    ) -> Work:
        present = {library: goal for library, goal in goals.items() if library not in missing}
        return lambda num_rounds: bandwidth.measure(op, num_blocks, nbytes, present, num_rounds, env) if present else []

    over_tcp = {NIXL: 1.0, NIXL_LEAN: 1.0, MOONCAKE: 1.0}
    return {
        "write-64k": bandwidth_of("write", 1024, 65536, {MEMCPY: 0.90, NIXL: 2.5, NIXL_LEAN: 1.0}),
        "read-64k": bandwidth_of("read", 1024, 65536, {MEMCPY: 0.85, NIXL: 2.0, NIXL_LEAN: 1.0}),
        "write-12k": bandwidth_of("write", 960, 12288, {MEMCPY: 0.75, NIXL: 4.0, NIXL_LEAN: 1.0}),
        "read-12k": bandwidth_of("read", 960, 12288, {MEMCPY: 0.75, NIXL: 4.0, NIXL_LEAN: 1.0}),
        "latency": lambda num_rounds: [
            latency.measure(4096, "4 KiB", num_rounds, adds_memcpy=False),
            latency.measure(SMOLLM2_BLOCK, "SmolLM2's block", num_rounds, adds_memcpy=True),
        ],
        "posting": posting.measure,
        "write-tcp": bandwidth_of("write", 1024, 65536, over_tcp, TCP),
        "read-tcp": bandwidth_of("read", 1024, 65536, over_tcp, TCP),
        "writers": lambda num_rounds: [writers.measure(num_rounds)],
        "allocation": allocation.measure,
    }
