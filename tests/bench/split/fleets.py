"""Two workers with one core each: one for each phase, or two that do both."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from gateway.costs import STALL_WEIGHT
from kvferry.aio import AsyncClient
from kvferry.bench.doors import GrpcDoor
from kvferry.bench.record import Record
from kvferry.bench.runner import Runner
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterConfig, Member, Role, clone_root, plan
from tests.bench.split.load import Mix
from tests.bench.system.systems import ROOT

TIMEOUT_S = 60.0
MAX_OPEN = 512


@dataclass(frozen=True, slots=True)
class Fleet:
    """``chunk_tokens``: the most prompt tokens in a step; ``mixed_tokens``: in one in which others decode;
    ``stall_weight`` and ``slo_itl_s``: the gateway's."""

    name: str
    num_prefill: int
    num_decode: int
    chunk_tokens: int
    mixed_tokens: int
    stall_weight: float = STALL_WEIGHT
    slo_itl_s: float = 0.0

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its address.  Raises ClusterError."""
        config = ClusterConfig(
            grpc_port=0, http_port=0, threads=1, pin=False, kv_memory="1GiB", num_prefill=self.num_prefill,
            num_decode=self.num_decode, log_level="warning",
        )  # fmt: skip
        planned = plan(config, clone_root())
        cores = iter(sorted(os.sched_getaffinity(0)))

        def given(member: Member) -> Member:
            if member.role is Role.GATEWAY:
                terms = ("--stall-weight", str(self.stall_weight), "--slo-itl-s", str(self.slo_itl_s))
                return replace(member, command=(*member.command, *terms))
            if member.role not in (Role.PREFILL, Role.DECODE):
                return member
            chunks = ("--chunk-tokens", str(self.chunk_tokens), "--mixed-chunk-tokens", str(self.mixed_tokens))
            extra = ("--cpus", str(next(cores)), *chunks)
            return replace(member, command=(*member.command, *extra))

        members = [given(member) for member in planned.members]
        cluster = LocalCluster(members, ROOT / "build/logs/bench-split" / self.name, restart=False)
        cluster.start()
        try:
            yield planned.grpc_address
        finally:
            cluster.stop()


def measure(address: str, mix: Mix, warm_s: float, seconds: float, seed: int) -> list[Record]:
    """What became of the requests that were due after the first ``warm_s``, all answered or failed."""
    return asyncio.run(_measure(address, mix, warm_s, seconds, seed))


async def _measure(address: str, mix: Mix, warm_s: float, seconds: float, seed: int) -> list[Record]:
    async with AsyncClient(address, max_attempts=1) as client:
        door = GrpcDoor(client)
        vocab_size = (await door.target()).vocab_size
        runner = Runner(door, max_open=MAX_OPEN, closed=False, timeout_s=TIMEOUT_S)
        outcome = await runner.run(mix.schedule(warm_s + seconds, vocab_size, seed))
    return [record for record in outcome.records if record.scheduled_s >= warm_s]
