"""Workers of one computing thread each, split one way or as the online planner has them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count

from kvferry.aio import AsyncClient
from kvferry.bench.doors import GrpcDoor
from kvferry.bench.record import Record
from kvferry.bench.runner import Runner
from kvferry.bench.workload import Ask, Prompts
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterConfig, Member, Role, clone_root, plan
from tests.bench.autoscale.load import Turn
from tests.bench.system.systems import ROOT

TIMEOUT_S = 60.0
MAX_OPEN = 512


@dataclass(frozen=True, slots=True)
class Fleet:
    """``planner``: flags of an online planner that may change roles; None for roles that stay."""

    name: str
    num_prefill: int
    num_decode: int
    planner: tuple[str, ...] | None = None

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its address.  Raises ClusterError."""
        config = ClusterConfig(
            grpc_port=0, http_port=0, threads=1, pin=False, kv_memory="512MiB", num_prefill=self.num_prefill,
            num_decode=self.num_decode, log_level="info",
        )  # fmt: skip
        planned = plan(config, clone_root())
        members = list(planned.members)
        if self.planner is not None:
            (directory,) = (m.health_address for m in members if m.role is Role.DIRECTORY)
            assert directory is not None
            command = (sys.executable, "-m", "services.planner.online", "--apply", "--directory", directory)
            members.append(Member("planner", Role.GATEWAY, (*command, *self.planner), cwd=ROOT))
        cluster = LocalCluster(members, ROOT / "build/logs/bench-autoscale" / self.name, restart=False)
        cluster.start()
        try:
            yield planned.grpc_address
        finally:
            cluster.stop()


def measure(address: str, turn: Turn, seed: int) -> tuple[Record, ...]:
    """What became of all requests."""
    return asyncio.run(_measure(address, turn, seed))


async def _measure(address: str, turn: Turn, seed: int) -> tuple[Record, ...]:
    async with AsyncClient(address, max_attempts=1) as client:
        door = GrpcDoor(client)
        vocab_size = (await door.target()).vocab_size
        runner = Runner(door, max_open=MAX_OPEN, closed=False, timeout_s=TIMEOUT_S)
        return (await runner.run(turn.schedule(vocab_size, seed))).records


def saturate(address: str, ask: Ask, num_open: int, seconds: float) -> list[Record]:
    """Requests of one shape, always ``num_open`` of them: those that began and ended within ``seconds``."""
    return asyncio.run(_saturate(address, ask, num_open, seconds))


async def _saturate(address: str, ask: Ask, num_open: int, seconds: float) -> list[Record]:
    async with AsyncClient(address, max_attempts=1) as client:
        door = GrpcDoor(client)
        prompts = Prompts((await door.target()).vocab_size, 1)
        runner = Runner(door, max_open=num_open, closed=True, timeout_s=TIMEOUT_S)
        schedule = ((0.0, ask, partial(prompts.make, ask, number)) for number in count())
        asyncio.get_running_loop().call_later(seconds, runner.stop)
        records = (await runner.run(schedule)).records
    return [record for record in records if record.error is None]
