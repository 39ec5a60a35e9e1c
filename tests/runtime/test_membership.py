from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest
import structlog

from gateway.view import Change, ClusterView, WorkerGone, WorkerJoined, watch
from kvferry import errors
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2, directory_pb2_grpc
from services.directory.index import Prefix
from services.directory.memory_store import MemoryStore
from services.directory.servicer import DirectoryServicer
from services.runtime.membership import Membership
from services.runtime.server import bind, create_server, running
from services.runtime.tier import Tier


def split_hashes(data: bytes) -> list[bytes]:
    return [data[i : i + 16] for i in range(0, len(data), 16)]


def block(n: int) -> bytes:
    return n.to_bytes(16, "big")


def info(worker_id: str = "d1", incarnation: int = 1) -> directory_pb2.WorkerInfo:
    return directory_pb2.WorkerInfo(
        worker_id=worker_id,
        incarnation=incarnation,
        role=common_pb2.WORKER_ROLE_DECODE,
        control_address="127.0.0.1:1",
    )


class Servicer(DirectoryServicer):
    """Lets a test hold up or fail publishing, and counts."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.gate = asyncio.Event()
        self.gate.set()
        self.publishes: list[directory_pb2.PublishBlocksRequest] = []
        self.fail_publish: list[Exception] = []
        self.lose_answers = 0

    async def PublishBlocks(self, request: Any, context: Any) -> directory_pb2.PublishBlocksResponse:
        self.publishes.append(request)
        await self.gate.wait()
        if self.fail_publish:
            raise self.fail_publish.pop(0)
        response = await super().PublishBlocks(request, context)
        if self.lose_answers:
            self.lose_answers -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
        return response


class Running:
    def __init__(self, store: MemoryStore, servicer: Servicer, port: int) -> None:
        self.store, self.servicer, self.address = store, servicer, f"127.0.0.1:{port}"

    def held(self, worker_id: str = "d1", tier: Tier = Tier.DEVICE) -> set[bytes]:
        return set(split_hashes(b"".join(self.store.state.index.held_by(worker_id, tier, 1000))))

    async def until(self, condition: Callable[[], bool], *, beat_s: float = 0.1) -> None:
        """Waits for a change of the directory that makes ``condition`` true; looks every ``beat_s`` as well."""
        async with asyncio.timeout(10), aclosing(self.store.watch(0, beat_s)) as changes:
            async for _ in changes:
                if condition():
                    return
        raise AssertionError("the watch ended")


@asynccontextmanager
async def directory(port: int = 0) -> AsyncIterator[Running]:
    async with MemoryStore() as store, AsyncExitStack() as stack:
        yield await serve(store, stack, port)
        store.directory.check_integrity()
        store.watchers.close()


async def serve(store: MemoryStore, stack: AsyncExitStack, port: int = 0) -> Running:
    """One of the directories of ``store``, until ``stack`` is left."""
    server, servicer = create_server(), Servicer(store)
    directory_pb2_grpc.add_DirectoryServiceServicer_to_server(servicer, server)
    port = bind(server, f"127.0.0.1:{port}")
    await stack.enter_async_context(running(server, grace_s=0.1))
    return Running(store, servicer, port)


class Worker:
    """A worker's cache and its membership."""

    def __init__(self, *addresses: str, worker: directory_pb2.WorkerInfo | None = None, **options: Any) -> None:
        self.cache: set[bytes] = set()
        self.caches = {Tier.DEVICE: self.cache, Tier.HOST: set[bytes]()}
        self.load = directory_pb2.WorkerLoad()
        self.num_snapshots = 0
        self.membership = Membership(addresses, worker or info(), lambda: self.load, self.snapshot, **options)

    def snapshot(self) -> dict[Tier, list[bytes]]:
        self.num_snapshots += 1
        return {tier: sorted(cache) for tier, cache in self.caches.items()}

    def store(self, *numbers: int) -> None:
        self.cache |= set(map(block, numbers))
        self.membership.stored([block(n) for n in numbers])

    def remove(self, *numbers: int) -> None:
        self.cache -= set(map(block, numbers))
        self.membership.removed([block(n) for n in numbers])


def num_workers(place: Running) -> int:
    return len(place.store.state.workers.values())


async def test_joins_reports_and_leaves() -> None:
    async with directory() as place:
        worker = Worker(place.address, lease_ttl_s=1)
        worker.store(1, 2)
        async with worker.membership:
            await place.until(lambda: place.held() == {block(1), block(2)})
            assert worker.membership.registered
            worker.store(3)
            worker.remove(1)
            await place.until(lambda: place.held() == {block(2), block(3)})
            worker.load.num_running = 5
            # Longer than the lease, with no more than a third of it between two reports.
            await place.until(lambda: directory_pb2.WorkerLoad.FromString(
                place.store.state.workers["d1"].load).num_running == 5)  # fmt: skip
            worker.cache.clear()
            worker.membership.cleared()
            await place.until(lambda: not place.held())
        assert num_workers(place) == 0
        assert not worker.membership.registered
        assert worker.num_snapshots == 1


async def test_is_told_at_once_when_asked_to() -> None:
    async with directory() as place:
        worker = Worker(place.address, lease_ttl_s=300)  # by itself it would report after 100 s
        async with worker.membership:
            await place.until(lambda: num_workers(place) == 1)
            worker.load.draining = True
            worker.membership.report()
            await place.until(lambda: directory_pb2.WorkerLoad.FromString(
                place.store.state.workers["d1"].load).draining)  # fmt: skip


async def test_comes_back_as_another_with_all_its_blocks() -> None:
    async with directory() as place:
        worker, later = Worker(place.address, lease_ttl_s=300), info()
        later.role = common_pb2.WORKER_ROLE_PREFILL
        worker.store(1, 2)
        async with worker.membership:
            await place.until(lambda: place.held() == {block(1), block(2)})
            async with asyncio.timeout(10):
                await worker.membership.describe(later)
            assert directory_pb2.WorkerInfo.FromString(place.store.state.workers["d1"].info) == later
            await place.until(lambda: place.held() == {block(1), block(2)})
            worker.store(3)
            await place.until(lambda: len(place.held()) == 3)


async def test_comes_back_as_another_also_when_the_directory_was_away() -> None:
    async with MemoryStore() as store, AsyncExitStack() as second:
        first = AsyncExitStack()
        place, later = await serve(store, first), info()
        later.role = common_pb2.WORKER_ROLE_PREFILL
        worker = Worker(place.address, lease_ttl_s=300)
        async with worker.membership:
            await place.until(lambda: num_workers(place) == 1)
            await first.aclose()
            describing = asyncio.create_task(worker.membership.describe(later))
            await asyncio.sleep(0.1)
            assert not describing.done()
            place = await serve(store, second, int(place.address.rpartition(":")[2]))
            async with asyncio.timeout(20):
                await describing
            assert directory_pb2.WorkerInfo.FromString(store.state.workers["d1"].info) == later


async def test_each_tier_has_its_blocks() -> None:
    async with directory() as place, viewing(place.address) as (view, _):
        worker = Worker(place.address)
        worker.cache |= {block(1), block(2)}
        worker.caches[Tier.HOST].add(block(3))
        async with worker.membership:
            await place.until(lambda: place.held(tier=Tier.HOST) == {block(3)})
            assert place.held() == {block(1), block(2)}
            # As when a block moves from the device to the host.
            worker.membership.stored([block(2)], Tier.HOST)
            worker.remove(2)
            await place.until(lambda: place.held(tier=Tier.HOST) == {block(2), block(3)})
            await place.until(lambda: place.held() == {block(1)})
            chain = [block(1), block(2), block(3)]
            await place.until(lambda: view.longest_prefix(chain) == {"d1": Prefix(3, 1)}, beat_s=0.02)


async def test_the_lease_is_kept() -> None:
    async with directory() as place:
        worker = Worker(place.address, lease_ttl_s=1)
        async with worker.membership:
            await place.until(lambda: num_workers(place) == 1)
            gone = asyncio.create_task(place.until(lambda: num_workers(place) == 0))
            done, _ = await asyncio.wait([gone], timeout=1.6)
            assert not done
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone


async def test_starts_without_a_directory_and_leaves_without_one() -> None:
    async with directory() as place:
        address = place.address
    worker = Worker(address)
    async with asyncio.timeout(5):
        async with worker.membership:
            worker.store(1)
        assert not worker.membership.registered


@asynccontextmanager
async def viewing(*addresses: str) -> AsyncIterator[tuple[ClusterView, asyncio.Queue[list[Change]]]]:
    view, changes = ClusterView(), asyncio.Queue[list[Change]]()
    task = asyncio.create_task(watch(view, addresses, on_change=changes.put_nowait))
    try:
        yield view, changes
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), task.exception()
        view.check_integrity()


async def test_survives_a_restart_of_the_directory_and_sends_its_blocks_again() -> None:
    async with AsyncExitStack() as stack:
        async with directory() as place:
            port = int(place.address.rpartition(":")[2])
            worker = Worker(place.address, lease_ttl_s=1.5)
            await stack.enter_async_context(worker.membership)
            view, changes = await stack.enter_async_context(viewing(place.address))
            worker.store(1, 2)
            await place.until(lambda: place.held() == {block(1), block(2)})
            (joined,) = await asyncio.wait_for(changes.get(), 5)
            assert isinstance(joined, WorkerJoined)
            old_revision = place.store.state.revision
        worker.remove(1)
        worker.store(3)
        async with directory(port) as place:
            await place.until(lambda: place.held() == {block(2), block(3)})
            assert place.store.state.revision > old_revision
            await place.until(lambda: view.revision > old_revision and view.num_blocks("d1") == 2, beat_s=0.02)
            assert view.longest_prefix([block(3)]) == {"d1": Prefix(1, 1)}
            assert view.longest_prefix([block(1)]) == {}
            assert worker.num_snapshots == 2
            assert changes.empty(), "the view let go of a worker that never stopped"
            await stack.aclose()


async def test_a_worker_that_falls_silent_expires_in_the_view() -> None:
    async with directory() as place, viewing(place.address) as (view, changes):
        worker = Worker(place.address, lease_ttl_s=1)
        async with worker.membership:
            assert isinstance((await asyncio.wait_for(changes.get(), 5))[0], WorkerJoined)
            # As if it had been killed: neither a goodbye nor a sign of life.
            worker.membership._tasks[0].cancel()
            (gone,) = await asyncio.wait_for(changes.get(), 5)
            assert gone == WorkerGone("d1", 1, directory_pb2.LEAVE_REASON_EXPIRED)
            assert dict(view.workers) == {}


async def test_a_new_incarnation_takes_over_and_the_old_one_gives_up() -> None:
    async with directory() as place, viewing(place.address) as (_, changes):
        old, new = (
            Worker(place.address, lease_ttl_s=1),
            Worker(place.address, worker=info(incarnation=2), lease_ttl_s=1),
        )
        with structlog.testing.capture_logs() as lines:
            async with old.membership:
                await asyncio.wait_for(changes.get(), 5)
                async with new.membership:
                    gone, joined = await asyncio.wait_for(changes.get(), 5)
                    assert gone == WorkerGone("d1", 1, directory_pb2.LEAVE_REASON_REPLACED)
                    assert isinstance(joined, WorkerJoined)
                    assert joined.state.info.incarnation == 2
                    await asyncio.wait_for(asyncio.shield(old.membership._tasks[0]), 5)
                    assert not old.membership.registered
                    assert [w.incarnation for w in place.store.state.workers.values()] == [2]
        assert [line["event"] for line in lines if line["log_level"] == "error"] == ["out of the cluster"]


async def test_a_lost_lease_is_replaced_by_a_new_one() -> None:
    async with directory() as place:
        worker = Worker(place.address, lease_ttl_s=1)
        async with worker.membership:
            worker.store(1)
            await place.until(lambda: place.held() == {block(1)})
            (lease_id,) = place.store.directory._by_lease
            await place.store.deregister(lease_id)
            await place.until(lambda: place.held() == {block(1)})
            assert lease_id not in place.store.directory._by_lease


async def test_a_lost_answer_is_sent_again_and_counted_once() -> None:
    async with directory() as place:
        worker = Worker(place.address)
        async with worker.membership:
            await place.until(lambda: len(place.servicer.publishes) == 1)
            place.servicer.lose_answers = 1
            worker.store(1)
            await place.until(lambda: place.held() == {block(1)})
            worker.remove(1)
            await place.until(lambda: not place.held())
            sequences = [request.first_sequence for request in place.servicer.publishes]
            assert sequences == [1, 2, 2, 3]
            assert worker.num_snapshots == 1


async def test_a_gap_leads_to_a_snapshot() -> None:
    async with directory() as place:
        worker = Worker(place.address)
        async with worker.membership:
            await place.until(lambda: len(place.servicer.publishes) == 1)
            place.servicer.fail_publish.append(errors.ConflictError("a gap", reason="SEQUENCE_GAP"))
            worker.store(1)
            await place.until(lambda: place.held() == {block(1)})
            assert worker.num_snapshots == 2


async def test_what_a_slow_directory_cannot_take_becomes_a_snapshot() -> None:
    async with directory() as place:
        worker = Worker(place.address, max_pending_hashes=10)
        async with worker.membership:
            await place.until(lambda: len(place.servicer.publishes) == 1)
            place.servicer.gate.clear()
            for n in range(100):
                worker.store(n)
                if n % 2:
                    worker.remove(n)
            place.servicer.gate.set()
            await place.until(lambda: place.held() == worker.cache)
            assert worker.num_snapshots == 2


async def test_events_come_from_other_threads_batched_and_in_order() -> None:
    async with directory() as place:
        worker = Worker(place.address)
        async with worker.membership:
            await place.until(lambda: len(place.servicer.publishes) == 1)

            def churn() -> None:
                for n in range(2_000):
                    worker.store(n)
                    if n % 3:
                        worker.remove(n)

            thread = threading.Thread(target=churn)
            thread.start()
            await asyncio.to_thread(thread.join, 10)
            await place.until(lambda: place.held() == worker.cache)
            assert len(place.servicer.publishes) < 1_000
        # A thread that has not noticed the end may go on.
        worker.store(1)


async def test_a_bug_in_a_callback_does_not_end_membership(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.runtime.backoff.random.uniform", lambda _a, _b: 0.05)
    async with directory() as place:
        worker = Worker(place.address)
        failures = [ZeroDivisionError("bug")]

        def snapshot() -> dict[Tier, list[bytes]]:
            if failures:
                raise failures.pop()
            return {Tier.DEVICE: [block(9)]}

        worker.membership._snapshot = snapshot
        with structlog.testing.capture_logs() as lines:
            async with worker.membership:
                await place.until(lambda: place.held() == {block(9)})
        assert "membership failed; registering again" in [line["event"] for line in lines]


async def test_another_directory_of_the_same_store_takes_over() -> None:
    async with MemoryStore() as store, AsyncExitStack() as stack:
        # Two services of one store: what a directory is to its worker where several share a Redis.
        stacks = [await stack.enter_async_context(AsyncExitStack()) for _ in range(2)]
        places = {place.address: (place, own) for own in stacks for place in [await serve(store, own)]}
        worker = Worker(*places, lease_ttl_s=1.5)
        view, changes = await stack.enter_async_context(viewing(*places))
        await stack.enter_async_context(worker.membership)
        place = next(iter(places.values()))[0]
        worker.store(1)
        await place.until(lambda: place.held() == {block(1)})
        lease_ids = set(store.directory._by_lease)
        assert isinstance((await asyncio.wait_for(changes.get(), 5))[0], WorkerJoined)
        await place.until(lambda: view.num_blocks("d1") == 1, beat_s=0.02)
        lost = worker.membership._directories.current.address
        await places[lost][1].aclose()
        worker.store(2)
        await place.until(lambda: place.held() == {block(1), block(2)})
        await place.until(lambda: view.num_blocks("d1") == 2, beat_s=0.02)
        # Longer than the lease.
        gone = asyncio.create_task(place.until(lambda: num_workers(place) == 0))
        done, _ = await asyncio.wait([gone], timeout=2.0)
        gone.cancel()
        assert not done
        assert set(store.directory._by_lease) == lease_ids, "it registered again"
        assert worker.num_snapshots == 1
        assert changes.empty()
        assert worker.membership._directories.current.address != lost


async def test_whose_event_loop_stood_still_through_its_lease_is_told_so() -> None:
    async with directory() as place:
        slept = asyncio.get_running_loop().create_future()
        worker = Worker(place.address, lease_ttl_s=1, on_slept=slept.set_result)
        async with worker.membership:
            await place.until(lambda: worker.membership.registered)  # the worker knows, not the directory alone
            time.sleep(1.2)  # noqa: ASYNC251 - as SIGSTOP would
            assert await asyncio.wait_for(slept, 5) >= 1.0


async def test_a_directory_that_is_away_for_longer_than_a_lease_fences_nobody() -> None:
    slept: list[float] = []
    async with AsyncExitStack() as stack:
        async with directory() as place:
            worker = Worker(place.address, lease_ttl_s=1, on_slept=slept.append)
            await stack.enter_async_context(worker.membership)
            await place.until(lambda: num_workers(place) == 1)
        await asyncio.sleep(1.5)
        async with directory(int(place.address.rpartition(":")[2])) as back:
            await back.until(lambda: num_workers(back) == 1)
    assert slept == []
