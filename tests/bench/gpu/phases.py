"""What splitting the phases does to first tokens and to gaps, in clusters of real processes that serve random weights.

Where there are two devices, the prefill worker has the first and the decode worker the second; on one they share it, and a
prompt can only be kept from a stream's steps as far as the device itself does several things at once.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from kvferry import Client
from kvferry.aio import AsyncClient
from kvferry.bench.record import percentile
from kvferry.cli.cluster import LocalCluster, Timing
from kvferry.cli.members import ClusterConfig, Role, clone_root, plan
from services.engine.model_config import ModelConfig
from tests.bench.gpu.floors import kv_token_nbytes
from tests.bench.gpu.rows import Row, less_is_better
from tests.bench.overlap import running
from tests.bench.system.systems import ROOT

TIMEOUT_S = 600.0
HEARD_S = 30.0
START_S = 900.0  # the first time on a machine the kernels are compiled
TTFT_GOAL, ITL_GOAL = 1 / 1.05, 1 / 1.2
TTFT, ITL = "ttft", "itl"


@dataclass(frozen=True, slots=True)
class Load:
    """``num_streams`` answers at once of ``num_answer`` tokens, to prompts of ``num_prompt``; and prompts of ``num_long``
    one after the other beside them."""

    num_streams: int = 16
    num_prompt: int = 128
    num_answer: int = 512
    num_long: int = 8000


@dataclass(frozen=True, slots=True)
class Served:
    """What is served, and on which devices, as ``--device`` has them: workers take them in turn."""

    config: ModelConfig
    folder: Path
    devices: tuple[str, ...]

    def kv_nbytes(self, load: Load) -> int:
        """Of a pool: twice what a load holds at once in bfloat16, for on a CPU KV may be float32."""
        num_tokens = load.num_streams * (load.num_prompt + load.num_answer) + 3 * load.num_long
        return 2 * num_tokens * kv_token_nbytes(self.config)


def measure(served: Served, load: Load, rounds: int, only: Collection[str]) -> Iterator[Row]:
    """TTFT and ITL of a prefill and a decode worker; ITL of one worker that does both as well.  ``only`` names them."""
    name = served.config.name
    with _cluster(served, "split", load) as (split_address, alone_address):
        if TTFT in only:
            yield first_tokens(name, split_address, alone_address, load.num_long, rounds)
        if ITL in only:
            goal = ITL_GOAL if len(served.devices) > 1 else None
            yield gaps(f"{name} {_beside(load)}, split", split_address, load, goal)
    if ITL in only:
        with _cluster(served, "colocated", load) as (address,):
            yield gaps(f"{name} {_beside(load)}, colocated", address, load)


def first_tokens(name: str, split_address: str, alone_address: str, num_tokens: int, rounds: int) -> Row:
    """Split against the same prompt on one worker, in turn."""
    with Client(split_address) as split, Client(alone_address) as alone:
        pairs = [running.measure(split, alone, num_tokens, split_first=n % 2 == 0) for n in range(rounds + 1)][1:]
    split_s, alone_s = (statistics.median(getattr(pair, which) for pair in pairs) for which in ("split_s", "single_s"))
    return less_is_better(
        f"{name} TTFT of {num_tokens} tokens, split; peer: on one worker", split_s, alone_s, TTFT_GOAL
    )


def gaps(work: str, address: str, load: Load, goal: float | None = None) -> Row:
    """The 99th percentile of the streams' gaps beside long prompts against without."""
    asyncio.run(_gaps(address, load, beside=True))  # warms up
    quiet, mixed = (asyncio.run(_gaps(address, load, beside=beside)) for beside in (False, True))
    return less_is_better(work, percentile(mixed, 99), percentile(quiet, 99), goal)


def _beside(load: Load) -> str:
    return f"p99 ITL beside prompts of {load.num_long}"


@contextmanager
def _cluster(served: Served, kind: str, load: Load) -> Iterator[list[str]]:
    """The addresses of its gateways: one that splits every prompt and one that splits none, of a decode worker alone just
    one.  Neither looks at costs, by which a short prompt may stay where it is."""
    is_split = kind == "split"
    config = ClusterConfig(
        model=str(served.folder), devices=served.devices, kv_memory=str(served.kv_nbytes(load)), grpc_port=0, http_port=0,
        threads=1, num_prefill=int(is_split), num_gateways=1 + is_split, log_level="warning",
    )  # fmt: skip
    planned = plan(config, clone_root())
    least = iter((1, running.NEVER_SHIP))
    members = [
        replace(member, command=(*member.command, "--routing", "round-robin", "--min-ship-tokens", str(next(least))))
        if member.role is Role.GATEWAY else member
        for member in planned.members
    ]  # fmt: skip
    logs = ROOT / "build/logs/bench-gpu" / served.config.name / kind
    with LocalCluster(members, logs, restart=False, timing=Timing(start_s=START_S)):
        addresses = planned.grpc_address.split(",")
        for address in addresses:
            _await_workers(address, 1 + is_split)
        yield addresses


def _await_workers(address: str, count: int) -> None:
    """A gateway is ready once it knows a decode worker."""
    until_s = time.monotonic() + HEARD_S
    with Client(address) as client:
        while len(client.cluster().workers) < count:
            if time.monotonic() > until_s:
                raise TimeoutError(f"the gateway at {address} has not heard of {count} workers within {HEARD_S:g} s")
            time.sleep(0.05)


async def _gaps(address: str, load: Load, *, beside: bool) -> list[float]:
    """Seconds between tokens, from when all streams had their first one until the first of them had its last."""
    async with AsyncClient(address, max_attempts=1) as client:
        begun = asyncio.Semaphore(0)

        async def stream() -> list[float]:
            times = []
            asked = client.generate(
                running.prompt_of(load.num_prompt), max_tokens=load.num_answer, temperature=0, ignore_eos=True,
                timeout=TIMEOUT_S,
            )  # fmt: skip
            try:
                async with asked as answer:
                    async for chunk in answer:
                        if chunk.tokens:
                            times.append(time.perf_counter())
                            if len(times) == 1:
                                begun.release()
            finally:
                if not times:  # nobody waits for one that has failed
                    begun.release()
            return times

        async def prompts() -> None:
            while True:
                prompt = running.prompt_of(load.num_long)
                await client.generate(prompt, max_tokens=1, ignore_eos=True, timeout=TIMEOUT_S).result()

        streams = [asyncio.create_task(stream()) for _ in range(load.num_streams)]
        for _ in streams:
            await begun.acquire()
        longs = asyncio.create_task(prompts()) if beside else None
        times = await asyncio.gather(*streams)
        if longs is not None:
            longs.cancel()
            await asyncio.wait([longs])
            if not longs.cancelled():
                longs.result()
    return within(times)


def within(times: Sequence[Sequence[float]]) -> list[float]:
    """The gaps of all streams while all of them ran, the shortest first.  Raises ValueError where they never did."""
    begun_s, ended_s = max(each[0] for each in times), min(each[-1] for each in times)
    found = sorted(
        after - before for each in times for before, after in pairwise(each) if begun_s <= before and after <= ended_s
    )
    if not found:
        raise ValueError("the streams never ran all at once; ask for longer answers")
    return found
