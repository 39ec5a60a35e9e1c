"""Block events through two directories that share a Redis, next to one that has all in memory: a watcher at each directory
reads all that 16 workers publish, first as fast as they are answered, then at an easy pace, at which delays are taken."""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2, directory_pb2_grpc
from services.runtime.channel import open_channel
from tests.bench.directory.processes import Directories, directories
from tests.bench.transport.rows import Row, less_is_better, more_is_better, within

NUM_WORKERS = 16
BLOCKS_PER_EVENT = 64
# A worker holds so many events' blocks; the oldest go as new ones come.
HELD_EVENTS = 20
SECONDS = 4.0
PACED_S = 0.2
# What 16 workers at 20,000 tokens/s each would store and evict, at 16 tokens a block.
ASKED_BLOCKS_PER_S = 2 * 16 * 20_000 / 16
DELAY_MS = 50.0


@dataclass(frozen=True, slots=True)
class Run:
    blocks_per_s: float
    events_per_s: float
    p50_ms: float
    p99_ms: float
    directory_us: float
    """Processor time of all directories for one block."""
    redis_us: float

    def told(self) -> str:
        return (
            f"{self.blocks_per_s:.0f} blocks/s in {self.events_per_s:.0f} calls/s; "
            f"at an easy pace seen after p50 {self.p50_ms:.1f} and p99 {self.p99_ms:.1f} ms; "
            f"a block takes {self.directory_us:.2f} us of the directories' processor time, {self.redis_us:.2f} us of Redis'"
        )


def measured(rounds: int) -> tuple[list[Row], list[str]]:
    runs: dict[bool, list[Run]] = {True: [], False: []}
    for number in range(rounds):
        for is_shared in (True, False) if number % 2 else (False, True):
            with directories(shared=is_shared) as processes:
                runs[is_shared].append(asyncio.run(_load(processes)))
    shared, alone = ([run.blocks_per_s for run in runs[key]] for key in (True, False))
    rows = [
        more_is_better(
            "blocks/s by two directories on Redis / asked", shared, [ASKED_BLOCKS_PER_S] * rounds, 1, "blocks/s"
        ),
        more_is_better("blocks/s by two directories on Redis / one in memory", shared, alone, 0.25, "blocks/s"),
        within(
            "delay to the watchers of both, easy pace, p99 / allowed",
            [run.p99_ms for run in runs[True]],
            DELAY_MS,
            "ms",
        ),
        less_is_better(
            "processor time a block, directories and Redis / one in memory",
            [run.directory_us + run.redis_us for run in runs[True]],
            [run.directory_us for run in runs[False]],
            0.2,
            "us",
        ),
    ]
    said = [f"{'two on Redis' if key else 'one in memory'}: {run.told()}" for key in runs for run in runs[key]]
    return rows, said


async def _load(processes: Directories) -> Run:
    channels = [open_channel(address) for address in processes.addresses]
    stubs = [directory_pb2_grpc.DirectoryServiceStub(channel) for channel in channels]
    sent_s: dict[bytes, float] = {}
    delays_s: list[float] = []
    watchers = [asyncio.create_task(_watch(stub, sent_s, delays_s)) for stub in stubs]
    publishers = [_Publisher(number, stubs[number % len(stubs)], sent_s) for number in range(NUM_WORKERS)]
    await asyncio.gather(*(publisher.register() for publisher in publishers))
    tasks = [asyncio.create_task(publisher.publish()) for publisher in publishers]
    await asyncio.sleep(1.0)
    pids = (processes.pids(), [processes.redis.pid] if processes.redis else [])
    before = [sum(map(_cpu_s, some)) for some in pids]
    blocks, began_s = sum(p.num_blocks for p in publishers), time.perf_counter()
    await asyncio.sleep(SECONDS)
    seconds = time.perf_counter() - began_s
    blocks = sum(p.num_blocks for p in publishers) - blocks
    directory_s, redis_s = (sum(map(_cpu_s, some)) - b for some, b in zip(pids, before, strict=True))
    for publisher in publishers:
        publisher.pause_s = PACED_S
    await asyncio.sleep(2 * PACED_S)
    delays_s.clear()
    await asyncio.sleep(SECONDS)
    found = sorted(delays_s)
    for task in (*tasks, *watchers):
        task.cancel()
    ended = await asyncio.gather(*tasks, *watchers, return_exceptions=True)
    for channel in channels:
        await channel.close()
    for error in ended:
        if isinstance(error, Exception):
            raise error
    return Run(
        blocks / seconds, blocks / seconds / BLOCKS_PER_EVENT / 2, 1e3 * statistics.median(found),
        1e3 * found[len(found) * 99 // 100], 1e6 * directory_s / blocks, 1e6 * redis_s / blocks,
    )  # fmt: skip


class _Publisher:
    def __init__(self, number: int, stub: Any, sent_s: dict[bytes, float]) -> None:
        self.num_blocks = 0
        self.pause_s = 0.0
        self._number = number
        self._stub = stub
        self._sent_s = sent_s
        self._held: list[bytes] = []

    async def register(self) -> None:
        info = directory_pb2.WorkerInfo(
            worker_id=f"worker-{self._number}", incarnation=time.time_ns(), role=common_pb2.WORKER_ROLE_DECODE,
            control_address="127.0.0.1:1",
        )  # fmt: skip
        request = directory_pb2.RegisterRequest(info=info, lease_ttl_ms=60_000)
        self._lease_id = (await self._stub.Register(request, timeout=10)).lease_id

    async def publish(self) -> None:
        sequence = 1
        for count in itertools.count():
            hashes = os.urandom(16 * BLOCKS_PER_EVENT)
            events = [directory_pb2.BlockEvent(stored=hashes)]
            self._held.append(hashes)
            if count >= HELD_EVENTS:
                events.append(directory_pb2.BlockEvent(removed=self._held.pop(0)))
            self._sent_s[hashes[:16]] = time.perf_counter()
            request = directory_pb2.PublishBlocksRequest(
                lease_id=self._lease_id, first_sequence=sequence, events=events
            )
            sequence = (await self._stub.PublishBlocks(request, timeout=10)).next_sequence
            self.num_blocks += BLOCKS_PER_EVENT * len(events)
            await asyncio.sleep(self.pause_s)


async def _watch(stub: Any, sent_s: dict[bytes, float], delays_s: list[float]) -> None:
    async for response in stub.Watch(directory_pb2.WatchRequest()):
        now_s = time.perf_counter()
        for event in response.events:
            for change in event.blocks.events:
                if change.WhichOneof("event") == "stored":
                    delays_s.append(now_s - sent_s[change.stored[:16]])


def _cpu_s(pid: int) -> float:
    """User and system time of all threads so far (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
