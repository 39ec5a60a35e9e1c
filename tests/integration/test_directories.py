"""Several directories as processes, sharing a Redis, under a load of block events; one of them, or Redis, is killed."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from gateway.view import Change, ClusterView, WorkerGone, watch
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import Member, Role, clone_root
from kvferry.cli.ports import pick_free
from services.runtime.membership import Membership
from services.runtime.tier import Tier
from tests.directory.redis_server import RedisServer

NUM_WORKERS = 4
HELD = 2_000
LEASE_TTL_S = 3.0


class Worker:
    """A prefix cache without a model behind it: blocks that were never there before come, older ones go."""

    def __init__(self, number: int, addresses: tuple[str, ...]) -> None:
        self.name = f"worker-{number}"
        self.cache: dict[bytes, None] = {}
        self.num_snapshots = 0
        self._number = number
        self._next = 0
        self._rng = random.Random(number)
        info = directory_pb2.WorkerInfo(
            worker_id=self.name, incarnation=time.time_ns(), role=common_pb2.WORKER_ROLE_DECODE, control_address="h:1"
        )
        self.membership = Membership(addresses, info, directory_pb2.WorkerLoad, self._snapshot, lease_ttl_s=LEASE_TTL_S)

    def _snapshot(self) -> dict[Tier, list[bytes]]:
        self.num_snapshots += 1
        return {Tier.DEVICE: list(self.cache)}

    def step(self) -> None:
        new = [self._block() for _ in range(self._rng.randrange(1, 60))]
        self.cache.update(dict.fromkeys(new))
        self.membership.stored(new)
        if len(self.cache) > HELD:
            gone = self._rng.sample(list(self.cache), len(self.cache) - HELD)
            for hash_ in gone:
                del self.cache[hash_]
            self.membership.removed(gone)

    def _block(self) -> bytes:
        self._next += 1
        return self._number.to_bytes(4, "big") + self._next.to_bytes(12, "big")


class StrictView(ClusterView):
    """A gateway's, which notices what comes twice and what goes without having come.  Between a worker's join or clearing
    and the end of its snapshot it may hear again of what it knows: only from the second snapshot of a worker on."""

    def __init__(self) -> None:
        super().__init__()
        self.num_snapshots = 0
        self.gone: list[WorkerGone] = []
        self.doubled = 0
        self.unknown = 0
        self._held: dict[str, set[bytes]] = {}

    def apply_in_steps(self, response: directory_pb2.WatchResponse) -> Iterator[list[Change]]:
        self.num_snapshots += response.snapshot
        for event in response.events:
            if event.WhichOneof("event") == "joined":
                self._held[event.joined.info.worker_id] = set()
            for change in event.blocks.events:
                held = self._held[event.blocks.worker_id]
                data = change.stored or change.removed
                hashes = {data[i : i + 16] for i in range(0, len(data), 16)}
                match change.WhichOneof("event"):
                    case "cleared":
                        held.clear()
                    case "stored":
                        self.doubled += len(hashes & held)
                        held |= hashes
                    case "removed":
                        self.unknown += len(hashes - held)
                        held -= hashes
        yield from super().apply_in_steps(response)

    def heard(self, changes: list[Change]) -> None:
        self.gone += [change for change in changes if isinstance(change, WorkerGone)]

    def blocks(self, name: str) -> set[bytes]:
        return set(self.index.held_by(name, Tier.DEVICE, 1))


class Cluster:
    def __init__(self, directories: LocalCluster, addresses: tuple[str, ...]) -> None:
        self.directories = directories
        self.workers = [Worker(number, addresses) for number in range(NUM_WORKERS)]
        self.views = [StrictView() for _ in range(3)]

    async def load(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            for worker in self.workers:
                worker.step()
            await asyncio.sleep(0.01)

    async def settle(self) -> None:
        """Until all views are what the workers have."""
        await self.until(
            lambda: all(v.blocks(w.name) == set(w.cache) for v in self.views for w in self.workers), "equal"
        )
        for view in self.views:
            view.check_integrity()

    async def until(self, holds: Callable[[], bool], what: str, within_s: float = 30.0) -> None:
        deadline_s = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < deadline_s, f"not within {within_s} s: {what}"
            await asyncio.sleep(0.05)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@asynccontextmanager
async def running(server: RedisServer, tmp_path: Path) -> AsyncIterator[Cluster]:
    addresses = tuple(f"127.0.0.1:{port}" for port in pick_free(2))
    members = [
        Member(
            f"directory-{i}",
            Role.DIRECTORY,
            (sys.executable, "-m", "services.directory", "--listen", address, "--store", server.url),
            address,
            "",
            cwd=clone_root(),
            environment={},
        )
        for i, address in enumerate(addresses)
    ]
    directories = LocalCluster(members, tmp_path / "logs", grpc_address="", http_url="")
    await asyncio.to_thread(directories.start)
    try:
        async with AsyncExitStack() as stack:
            cluster = Cluster(directories, addresses)
            for worker in cluster.workers:
                await stack.enter_async_context(worker.membership)
            tasks = [asyncio.create_task(watch(view, addresses, on_change=view.heard)) for view in cluster.views]
            yield cluster
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    finally:
        await asyncio.to_thread(directories.stop)


async def test_no_event_is_lost_or_doubled_when_a_directory_is_killed(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with running(redis_server, tmp_path) as cluster:
        await cluster.load(0.5)
        await cluster.settle()
        for name in ("directory-0", "directory-1"):
            cluster.directories.kill(name)
            await cluster.load(0.6)
            if name == "directory-0":
                assert [view.num_snapshots for view in cluster.views] == [1, 1, 1], "a watch began anew at the other"
            await asyncio.to_thread(cluster.directories.wait_ready, name, 30)
            await cluster.load(0.3)
        await cluster.settle()
        for view in cluster.views:
            assert (view.doubled, view.unknown, view.gone) == (0, 0, [])
        # Each worker said all it has once, at its start: nobody registered anew, no lease was lost.
        assert [worker.num_snapshots for worker in cluster.workers] == [1] * NUM_WORKERS


async def test_a_redis_that_forgets_all_is_told_again(redis_server: RedisServer, tmp_path: Path) -> None:
    async with running(redis_server, tmp_path) as cluster:
        await cluster.load(0.5)
        await cluster.settle()
        redis_server.kill()
        await cluster.load(0.6)
        await asyncio.to_thread(redis_server.start)
        await cluster.load(0.6)
        await cluster.until(lambda: all(w.num_snapshots == 2 for w in cluster.workers), "all said again what they have")
        await cluster.settle()
        assert [view.gone for view in cluster.views] == [[]] * len(cluster.views)
