"""Workers of one computing thread each, split one way or as the online planner has them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

from kvferry.aio import AsyncClient
from kvferry.bench.doors import GrpcDoor
from kvferry.bench.record import Record
from kvferry.bench.runner import Runner
from kvferry.bench.workload import Ask, Prompts
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import Autoscale, ClusterConfig, Role, clone_root, plan
from tests.bench.autoscale.load import Turn
from tests.bench.autoscale.quota import limited
from tests.bench.system.systems import ROOT

TIMEOUT_S = 60.0
MAX_OPEN = 512


@dataclass(frozen=True, slots=True)
class Fleet:
    """``follows``: what is in time for a planner that may change roles, and more of its flags; None for roles that stay."""

    name: str
    num_prefill: int
    num_decode: int
    follows: tuple[float, float, tuple[str, ...]] | None = None  # TTFT, gap, flags

    @contextmanager
    def running(self, cores: float | None) -> Iterator[str]:
        """Its address.  ``cores``: what each worker gets once it has started.  Raises ClusterError, NoQuota."""
        log_dir = ROOT / "build/logs/bench-autoscale" / self.name
        config = ClusterConfig(
            grpc_port=0, http_port=0, threads=1, pin=False, kv_memory="512MiB", num_prefill=self.num_prefill,
            num_decode=self.num_decode, log_dir=log_dir,
        )  # fmt: skip
        if self.follows is not None:
            ttft_s, itl_s, flags = self.follows
            workers = self.num_prefill + self.num_decode
            config = replace(config, autoscale=Autoscale(workers, workers, ttft_s, itl_s))
        planned = plan(config, clone_root())
        members = [replace(m, command=(*m.command, *flags)) if m.role is Role.PLANNER else m for m in planned.members]
        cluster = LocalCluster(members, log_dir, restart=False)
        cluster.start()
        try:
            names = [m.name for m in members if m.role in (Role.PREFILL, Role.DECODE)]
            pids = [pid for name in names if (pid := cluster.pid(name)) is not None]
            with nullcontext() if cores is None else limited(pids, cores):
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


def saturate(address: str, ask: Ask, num_open: int, seconds: float) -> tuple[Record, ...]:
    """Requests of one shape, always ``num_open`` of them, for ``seconds``; then the last are cut off."""
    return asyncio.run(_saturate(address, ask, num_open, seconds))


async def _saturate(address: str, ask: Ask, num_open: int, seconds: float) -> tuple[Record, ...]:
    async with AsyncClient(address, max_attempts=1) as client:
        door = GrpcDoor(client)
        prompts = Prompts((await door.target()).vocab_size, 1)
        runner = Runner(door, max_open=num_open, closed=True, timeout_s=TIMEOUT_S)
        schedule = ((0.0, ask, partial(prompts.make, ask, number)) for number in count())
        asyncio.get_running_loop().call_later(seconds, runner.stop)
        return (await runner.run(schedule)).records
