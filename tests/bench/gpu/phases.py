"""What splitting the phases does to first tokens and to gaps, in clusters of real processes.

Where there are two devices, the prefill worker has the first and the decode worker the second; on one they share it, and a
prompt can only be kept from a stream's steps as far as the device itself does several things at once.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from kvferry import Client
from kvferry.aio import AsyncClient
from kvferry.bench.record import percentile
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterConfig, clone_root, plan
from tests.bench.gpu.rows import Row
from tests.bench.overlap import running
from tests.bench.system.systems import ROOT

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Load:
    """``num_streams`` answers at once of ``num_answer`` tokens, to prompts of ``num_prompt``; and prompts of ``num_long``
    one after the other beside them."""

    num_streams: int = 16
    num_prompt: int = 128
    num_answer: int = 512
    num_long: int = 8000


def first_tokens(devices: tuple[str, ...], num_tokens: int, rounds: int) -> Row:
    """Split against the same prompt on one worker, in turn."""
    cluster, split_address, single_address = running.cluster(devices)
    with cluster, Client(split_address) as split, Client(single_address) as single:
        pairs = [running.measure(split, single, num_tokens, split_first=n % 2 == 0) for n in range(rounds + 1)][1:]
    split_s, single_s = (statistics.median(getattr(pair, which) for pair in pairs) for which in ("split_s", "single_s"))
    return Row(f"TTFT of {num_tokens} tokens, split; floor: on one worker", split_s, single_s)


def gaps(devices: tuple[str, ...], load: Load) -> list[Row]:
    """The 99th percentile of the streams' gaps beside long prompts against without: of a prefill and a decode worker, and
    of one that does both."""
    rows = []
    for name, num_prefill in (("split", 1), ("colocated", 0)):
        with _cluster(name, devices, num_prefill) as address:
            asyncio.run(_gaps(address, load, beside=True))  # warms up
            quiet, mixed = (asyncio.run(_gaps(address, load, beside=beside)) for beside in (False, True))
        beside = f"p99 ITL beside prompts of {load.num_long} tokens, {name}; floor: without"
        rows.append(Row(beside, percentile(mixed, 99), percentile(quiet, 99)))
    return rows


@contextmanager
def _cluster(name: str, devices: tuple[str, ...], num_prefill: int) -> Iterator[str]:
    """Its address."""
    config = ClusterConfig(
        grpc_port=0, http_port=0, threads=1, kv_memory="1GiB", num_prefill=num_prefill, devices=devices,
        log_level="warning",
    )  # fmt: skip
    planned = plan(config, clone_root())
    with LocalCluster(planned.members, ROOT / "build/logs/bench-gpu" / name, restart=False):
        yield planned.grpc_address


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
            async with asked as answer:
                async for chunk in answer:
                    if chunk.tokens:
                        times.append(time.perf_counter())
                        if len(times) == 1:
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
