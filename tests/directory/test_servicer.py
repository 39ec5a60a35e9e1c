from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import CollectorRegistry

from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2, directory_pb2_grpc
from services.directory import servicer as servicer_module
from services.directory.memory_store import MemoryStore
from services.directory.metrics import DirectoryCollector
from services.directory.redis_link import RedisLink
from services.directory.redis_store import RedisStore
from services.directory.servicer import DirectoryServicer
from services.directory.store import Store
from services.runtime.channel import open_channel
from services.runtime.server import bind, create_server, running


def block(n: int) -> bytes:
    return n.to_bytes(16, "big")


def info(worker_id: str = "d1", incarnation: int = 1) -> directory_pb2.WorkerInfo:
    return directory_pb2.WorkerInfo(
        worker_id=worker_id,
        incarnation=incarnation,
        role=common_pb2.WORKER_ROLE_DECODE,
        control_address="127.0.0.1:1",
        model=common_pb2.ModelInfo(name="m", revision="r"),
    )


Serving = Callable[..., AbstractAsyncContextManager[tuple[Any, Any, grpc.aio.Channel]]]


@pytest.fixture(params=["memory", "redis"])
def serving(request: pytest.FixtureRequest) -> Serving:
    """What either store promises by the service."""
    url = request.getfixturevalue("redis_server").url if request.param == "redis" else None

    def new_store(**options: Any) -> Store:
        if url is None:
            return MemoryStore(**options)
        return RedisStore(RedisLink(url, max_events=options.get("max_events", 100_000)), **options)

    @asynccontextmanager
    async def serve(**options: Any) -> AsyncIterator[tuple[Any, Store, grpc.aio.Channel]]:
        server, store = create_server(), new_store(**options)
        directory_pb2_grpc.add_DirectoryServiceServicer_to_server(DirectoryServicer(store), server)
        port = bind(server, "127.0.0.1:0")
        async with running(server, grace_s=1), store, open_channel(f"127.0.0.1:{port}") as channel:
            async with asyncio.timeout(10):
                async for is_available in store.availability():
                    if is_available:
                        break
            yield directory_pb2_grpc.DirectoryServiceStub(channel), store, channel
            assert store.state is not None
            store.state.check_integrity()
            if isinstance(store, MemoryStore):
                store.directory.check_integrity()

    return serve


async def register(stub: Any, worker: directory_pb2.WorkerInfo | None = None, ttl_ms: int = 60_000) -> int:
    request = directory_pb2.RegisterRequest(info=worker or info(), lease_ttl_ms=ttl_ms)
    lease_id: int = (await stub.Register(request, timeout=5)).lease_id
    return lease_id


async def publish(stub: Any, lease_id: int, first: int, *events: directory_pb2.BlockEvent) -> int:
    request = directory_pb2.PublishBlocksRequest(lease_id=lease_id, first_sequence=first, events=events)
    following: int = (await stub.PublishBlocks(request, timeout=5)).next_sequence
    return following


def stored(*numbers: int) -> directory_pb2.BlockEvent:
    return directory_pb2.BlockEvent(stored=b"".join(map(block, numbers)))


async def read(watch: Any) -> directory_pb2.WatchResponse:
    response = await asyncio.wait_for(watch.read(), 5)
    assert isinstance(response, directory_pb2.WatchResponse)
    return response


def reason_of(error: grpc.aio.AioRpcError) -> str:
    (data,) = (value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin")
    detail = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(data).details[0].Unpack(detail)
    return detail.reason


async def test_what_a_directory_does_not_know_it_passes_on(serving: Serving) -> None:
    """Labels and paths of any kind, and fields of a later version."""
    worker = info()
    worker.labels["planet"] = "\N{EARTH GLOBE EUROPE-AFRICA}"
    worker.paths.add(kind=99, scope="?")  # type: ignore[arg-type]
    worker.newest_protocol = 7
    worker.MergeFromString(b"\xca\x3e\x03new")  # field 1001
    async with serving() as (stub, _, _):
        await register(stub, worker)
        joined = (await read(stub.Watch(directory_pb2.WatchRequest(), timeout=20))).events[0].joined.info
    assert joined == worker
    assert b"new" in joined.SerializeToString()


async def test_the_life_of_a_worker_as_a_watcher_sees_it(serving: Serving) -> None:
    async with serving() as (stub, _, _):
        watch = stub.Watch(directory_pb2.WatchRequest(), timeout=20)
        first = await read(watch)
        assert first.snapshot
        assert not first.events
        lease = await register(stub)
        joined = await read(watch)
        assert joined.revision > first.revision
        assert joined.events[0].joined.info == info()
        load = directory_pb2.WorkerLoad(num_running=3)
        response = await stub.KeepAlive(directory_pb2.KeepAliveRequest(lease_id=lease, load=load), timeout=5)
        assert response.lease_ttl_ms == 60_000
        assert (await read(watch)).events[0].load.load == load
        assert await publish(stub, lease, 1, stored(1, 2), directory_pb2.BlockEvent(removed=block(2))) == 3
        blocks = (await read(watch)).events[0].blocks
        assert (blocks.worker_id, blocks.incarnation) == ("d1", 1)
        assert [event.WhichOneof("event") for event in blocks.events] == ["stored", "removed"]
        found = await stub.Lookup(directory_pb2.LookupRequest(hashes=block(1) + block(2)), timeout=5)
        assert [(m.worker_id, m.incarnation, m.num_blocks) for m in found.matches] == [("d1", 1, 1)]
        await stub.Deregister(directory_pb2.DeregisterRequest(lease_id=lease), timeout=5)
        await stub.Deregister(directory_pb2.DeregisterRequest(lease_id=lease), timeout=5)
        left = (await read(watch)).events[0].left
        assert (left.worker_id, left.reason) == ("d1", directory_pb2.LEAVE_REASON_DEREGISTERED)
        watch.cancel()


async def test_tiers_are_kept_apart(serving: Serving) -> None:
    async with serving() as (stub, _, _):
        lease = await register(stub)
        host = directory_pb2.TIER_HOST
        in_host = directory_pb2.BlockEvent(stored=block(2) + block(3), tier=host)
        await publish(stub, lease, 1, stored(1, 2), in_host, directory_pb2.BlockEvent(removed=block(3)))
        found = await stub.Lookup(directory_pb2.LookupRequest(hashes=b"".join(map(block, (1, 2, 3, 4)))), timeout=5)
        assert [(m.num_blocks, m.num_device_blocks) for m in found.matches] == [(3, 2)]
        watch = stub.Watch(directory_pb2.WatchRequest(), timeout=20)
        blocks = [e.blocks.events[0] for e in (await read(watch)).events if e.WhichOneof("event") == "blocks"]
        assert [(b.tier, b.stored) for b in blocks] == [(1, block(1) + block(2)), (2, block(2) + block(3))]
        watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError, match="knows no tier 9") as caught:
            await publish(stub, lease, 4, directory_pb2.BlockEvent(stored=block(1), tier=9))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_index_that_is_full_says_how_much_it_left_out(serving: Serving) -> None:
    async with serving(max_index_entries=2) as (stub, store, _):
        registry = CollectorRegistry()
        registry.register(DirectoryCollector(store))
        await publish(stub, await register(stub), 1, stored(1, 2, 3))
        assert registry.get_sample_value("kvferry_directory_index_left_out_total") == 1
        found = await stub.Lookup(directory_pb2.LookupRequest(hashes=b"".join(map(block, (1, 2, 3)))), timeout=5)
        assert [m.num_blocks for m in found.matches] == [2]


async def test_a_lease_that_nobody_renews_expires_by_itself(serving: Serving) -> None:
    async with serving() as (stub, _, _):
        watch = stub.Watch(directory_pb2.WatchRequest(), timeout=20)
        await read(watch)
        lease = await register(stub, ttl_ms=1_000)
        await register(stub, info("other"), ttl_ms=60_000)
        events = []
        while not events or events[-1].WhichOneof("event") != "left":
            events += (await read(watch)).events
        assert (events[-1].left.worker_id, events[-1].left.reason) == ("d1", directory_pb2.LEAVE_REASON_EXPIRED)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.KeepAlive(directory_pb2.KeepAliveRequest(lease_id=lease), timeout=5)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert reason_of(caught.value) == "LEASE_ENDED"
        watch.cancel()


async def test_a_watch_resumes_without_gap_or_repetition(serving: Serving) -> None:
    async with serving() as (stub, _, _):
        lease = await register(stub)
        watch = stub.Watch(directory_pb2.WatchRequest(), timeout=20)
        snapshot = await read(watch)
        watch.cancel()
        for n in range(3):
            await publish(stub, lease, n + 1, stored(n))
        again = stub.Watch(directory_pb2.WatchRequest(from_revision=snapshot.revision), timeout=20)
        resumed = await read(again)
        assert not resumed.snapshot
        assert [event.blocks.events[0].stored for event in resumed.events] == [block(n) for n in range(3)]
        again.cancel()


async def test_a_revision_of_another_life_gives_a_snapshot(serving: Serving) -> None:
    async with serving() as (stub, store, _):
        await register(stub)
        for revision in (1, store.state.revision + 1_000):
            watch = stub.Watch(directory_pb2.WatchRequest(from_revision=revision), timeout=20)
            assert (await read(watch)).snapshot
            watch.cancel()


async def test_a_slow_watcher_gets_a_snapshot_instead_of_a_queue(serving: Serving) -> None:
    async with serving(max_events=5) as (stub, store, _):
        lease = await register(stub)
        watch = stub.Watch(directory_pb2.WatchRequest(), timeout=60)
        assert (await read(watch)).snapshot
        # More than flow control lets pass unread.
        bulk = range(20_000)
        for n in range(40):
            await publish(stub, lease, n + 1, stored(*bulk, 20_000 + n))
        held: set[bytes] = set()
        saw_snapshot = False
        while True:
            response = await read(watch)
            if response.snapshot:
                saw_snapshot = True
                held.clear()
            for event in response.events:
                for change in event.blocks.events:
                    data = change.stored
                    held |= {data[i : i + 16] for i in range(0, len(data), 16)}
            if response.revision == store.state.revision:
                break
        assert saw_snapshot
        assert len(held) == 20_040
        watch.cancel()


async def test_a_large_snapshot_comes_in_parts_that_cannot_be_resumed_from(serving: Serving) -> None:
    async with serving() as (stub, store, _):
        lease = await register(stub)
        await register(stub, info("other"))
        for n in range(6):
            await publish(stub, lease, n + 1, stored(*range(40_000 * n, 40_000 * (n + 1))))
        watch = stub.Watch(directory_pb2.WatchRequest(), timeout=20)
        parts = [await read(watch)]
        while not parts[-1].revision:
            parts.append(await read(watch))
        assert len(parts) > 1
        assert [part.snapshot for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.revision for part in parts] == [0] * (len(parts) - 1) + [store.state.revision]
        assert [event.WhichOneof("event") for event in parts[0].events][:3] == ["joined", "joined", "blocks"]
        watch.cancel()


async def test_a_silent_directory_gives_signs_of_life(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    assert servicer_module._HEARTBEAT_S <= 2
    monkeypatch.setattr(servicer_module, "_HEARTBEAT_S", 0.05)
    async with serving() as (stub, _, _):
        watch = stub.Watch(directory_pb2.WatchRequest(), timeout=20)
        first = await read(watch)
        for _ in range(2):
            beat = await read(watch)
            assert (beat.revision, len(beat.events), beat.snapshot) == (first.revision, 0, False)
        watch.cancel()


async def test_gaps_and_replaced_incarnations_are_conflicts(serving: Serving) -> None:
    async with serving() as (stub, _, _):
        lease = await register(stub)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await publish(stub, lease, 2, stored(1))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert reason_of(caught.value) == "SEQUENCE_GAP"
        assert await publish(stub, lease, 2, directory_pb2.BlockEvent(cleared={}), stored(1)) == 4
        await register(stub, info(incarnation=2))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await register(stub, info(incarnation=1))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert reason_of(caught.value) == "REPLACED"


def broken(**changes: Any) -> directory_pb2.RegisterRequest:
    request = directory_pb2.RegisterRequest(info=info(), lease_ttl_ms=5_000)
    for name, value in changes.items():
        setattr(request if name == "lease_ttl_ms" else request.info, name, value)
    return request


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Register", broken(worker_id=""), "worker_id"),
        ("Register", broken(incarnation=0), "incarnation"),
        ("Register", broken(control_address=""), "control_address"),
        ("Register", broken(role=common_pb2.WORKER_ROLE_UNSPECIFIED), "role"),
        ("Register", broken(role=77), "role"),
        ("Register", broken(lease_ttl_ms=999), "lease_ttl_ms"),
        ("Register", broken(lease_ttl_ms=300_001), "lease_ttl_ms"),
        ("PublishBlocks", directory_pb2.PublishBlocksRequest(first_sequence=0), "first_sequence"),
        (
            "PublishBlocks",
            directory_pb2.PublishBlocksRequest(first_sequence=1, events=[{}]),
            "stored, removed or cleared",
        ),
        ("Lookup", directory_pb2.LookupRequest(hashes=b"x" * 17), "16 bytes"),
    ],
)
async def test_bad_requests_name_the_field(serving: Serving, method: str, request_: Any, field: str) -> None:
    async with serving() as (stub, store, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stub, method)(request_, timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in (caught.value.details() or "")
        assert not store.state.workers


async def test_malformed_bytes(serving: Serving) -> None:
    async with serving() as (stub, _, channel):
        for method in ("Register", "KeepAlive", "PublishBlocks", "Lookup"):
            call = channel.unary_unary(f"/kvferry.api.directory.v1.DirectoryService/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\x0a\xff\xff", timeout=5)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert reason_of(caught.value) == "MALFORMED_MESSAGE"
        await register(stub)


async def test_metrics_count_what_is_there(serving: Serving) -> None:
    async with serving() as (stub, store, _):
        registry = CollectorRegistry()
        registry.register(DirectoryCollector(store))
        lease = await register(stub)
        await publish(stub, lease, 1, stored(1, 2, 3))
        watch = stub.Watch(directory_pb2.WatchRequest(), timeout=20)
        await read(watch)
        prefix = "kvferry_directory"
        assert registry.get_sample_value(f"{prefix}_workers", {"role": "decode"}) == 1
        assert registry.get_sample_value(f"{prefix}_workers", {"role": "prefill"}) == 0
        assert registry.get_sample_value(f"{prefix}_index_entries") == 3
        assert registry.get_sample_value(f"{prefix}_index_bytes") > 0
        assert registry.get_sample_value(f"{prefix}_index_left_out_total") == 0
        assert registry.get_sample_value(f"{prefix}_watchers") == 1
        assert registry.get_sample_value(f"{prefix}_events_total") == 2
        watch.cancel()


async def test_closing_ends_watches_at_once(serving: Serving) -> None:
    async with serving() as (stub, store, _):
        watch = stub.Watch(directory_pb2.WatchRequest(), timeout=20)
        await read(watch)
        store.watchers.close()
        assert await asyncio.wait_for(watch.read(), 1) is grpc.aio.EOF
        assert len(store.watchers) == 0
