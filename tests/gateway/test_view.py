from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from gateway import view as view_module
from gateway.candidates import Abilities, Path, WorkerKey
from gateway.decisions import DecisionBook
from gateway.doorkeeper import Doorkeeper
from gateway.metrics import ViewCollector
from gateway.recent import RecentRequests
from gateway.served import ServedBook
from gateway.servicer import ClusterServicer
from gateway.siblings import Memory, Siblings
from gateway.view import ClusterView, WorkerGone, WorkerJoined, watch
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2, directory_pb2_grpc
from kvferry.api.inference.v1 import inference_pb2
from services.directory.core import Directory
from services.directory.events import Cleared, Removed, Role, Stored, Worker
from services.directory.index import Prefix
from services.directory.servicer import _response
from services.directory.state import ClusterState
from services.directory.watching import Changes, split
from services.runtime.place import Place
from services.runtime.protocol import Protocol
from services.runtime.server import bind, create_server, running


def block(n: int) -> bytes:
    return n.to_bytes(16, "big")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def state(worker_id: str, incarnation: int = 1) -> directory_pb2.WorkerState:
    return directory_pb2.WorkerState(
        info=directory_pb2.WorkerInfo(
            worker_id=worker_id,
            incarnation=incarnation,
            role=common_pb2.WORKER_ROLE_DECODE,
            control_address="h:1",
            layout=common_pb2.Layout(block_size_tokens=16),
        )
    )


def joined(worker_id: str, incarnation: int = 1) -> directory_pb2.Event:
    return directory_pb2.Event(joined=state(worker_id, incarnation))


def left(worker_id: str, incarnation: int = 1) -> directory_pb2.Event:
    reason = directory_pb2.LEAVE_REASON_EXPIRED
    return directory_pb2.Event(left={"worker_id": worker_id, "incarnation": incarnation, "reason": reason})


def stored(worker_id: str, *numbers: int, incarnation: int = 1) -> directory_pb2.Event:
    event = directory_pb2.BlockEvent(stored=b"".join(map(block, numbers)))
    return directory_pb2.Event(blocks={"worker_id": worker_id, "incarnation": incarnation, "events": [event]})


def response(revision: int, *events: directory_pb2.Event, snapshot: bool = False) -> directory_pb2.WatchResponse:
    return directory_pb2.WatchResponse(revision=revision, events=events, snapshot=snapshot)


def names(view: ClusterView) -> set[str]:
    return set(view.workers)


def test_age_counts_from_the_last_sign_of_life() -> None:
    clock = Clock()
    view = ClusterView(clock=clock)
    assert view.age_s == float("inf")
    view.apply(response(5, snapshot=True))
    clock.now_s += 3
    assert view.age_s == 3
    view.apply(response(5))
    assert view.age_s == 0


def test_workers_come_and_go() -> None:
    view = ClusterView()
    (change,) = view.apply(response(5, joined("a"), snapshot=True))
    assert isinstance(change, WorkerJoined)
    assert change.state == state("a")
    load = directory_pb2.WorkerLoad(num_running=2)
    assert view.apply(response(6, directory_pb2.Event(load={"worker_id": "a", "incarnation": 1, "load": load}))) == []
    assert view.workers["a"].load == load
    assert view.apply(response(7, stored("a", 1, 2))) == []
    assert view.longest_prefix([block(1), block(2), block(3)]) == {"a": Prefix(2, 2)}
    assert view.num_blocks("a") == 2
    assert view.apply(response(8, left("a"))) == [WorkerGone("a", 1, directory_pb2.LEAVE_REASON_EXPIRED)]
    assert names(view) == set()
    assert view.longest_prefix([block(1)]) == {}
    assert view.revision == 8
    view.check_integrity()


def test_what_concerns_another_incarnation_is_ignored() -> None:
    view = ClusterView()
    view.apply(response(5, joined("a", 2), snapshot=True))
    load = directory_pb2.WorkerLoad(num_running=2)
    events = [
        directory_pb2.Event(load={"worker_id": "a", "incarnation": 1, "load": load}),
        stored("a", 1, incarnation=1),
        left("a", 1),
        stored("stranger", 1),
    ]
    assert view.apply(response(6, *events)) == []
    assert view.workers["a"] == state("a", 2)
    assert view.longest_prefix([block(1)]) == {}
    view.check_integrity()


def test_a_new_incarnation_takes_the_blocks_away() -> None:
    view = ClusterView()
    view.apply(response(5, joined("a"), stored("a", 1), snapshot=True))
    gone, came = view.apply(response(6, joined("a", 2)))
    assert gone == WorkerGone("a", 1, directory_pb2.LEAVE_REASON_REPLACED)
    assert isinstance(came, WorkerJoined)
    assert view.longest_prefix([block(1)]) == {}


def test_workers_that_a_snapshot_lacks_have_time_to_return() -> None:
    clock = Clock()
    view = ClusterView(grace_s=10, clock=clock)
    view.apply(response(5, joined("a"), joined("b"), stored("a", 1), snapshot=True))
    assert view.apply(response(500, snapshot=True)) == []
    assert names(view) == {"a", "b"}
    assert view.longest_prefix([block(1)]) == {"a": Prefix(1, 1)}
    clock.now_s += 9
    assert view.apply(response(501, joined("b"))) == []
    clock.now_s += 1
    assert view.apply(response(501)) == [WorkerGone("a", 1, directory_pb2.LEAVE_REASON_UNSPECIFIED)]
    assert names(view) == {"b"}
    clock.now_s += 100
    assert view.apply(response(501)) == []
    view.check_integrity()


def test_a_worker_that_returns_brings_its_blocks_again() -> None:
    view = ClusterView()
    view.apply(response(5, joined("a"), stored("a", 1, 2), snapshot=True))
    view.apply(response(500, joined("a"), stored("a", 2, 3), snapshot=True))
    assert view.longest_prefix([block(1)]) == {}
    assert view.longest_prefix([block(2), block(3)]) == {"a": Prefix(2, 2)}


def test_an_incomplete_snapshot_cannot_be_resumed_from() -> None:
    view = ClusterView()
    view.apply(response(5, joined("a"), snapshot=True))
    view.apply(response(0, joined("a"), snapshot=True))
    assert view.revision == 0
    view.apply(response(0, stored("a", 1)))
    assert view.revision == 0
    view.apply(response(9, stored("a", 2)))
    assert view.revision == 9
    # Parts of ordinary changes: the old revision holds until the last has come.
    view.apply(response(0, stored("a", 3)))
    assert view.revision == 9


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "leave", "load", "blocks", "restart", "watch", "break"]),
        st.sampled_from(["a", "b", "c"]),
        st.lists(st.integers(0, 5), min_size=1, max_size=3),
    ),
    max_size=40,
)


@given(STEPS)
def test_the_view_becomes_what_the_directory_knows(steps: list[tuple[str, str, list[int]]]) -> None:
    """Through lost watches, half-received snapshots and restarts of the directory."""
    clock, incarnations, lives = Clock(), itertools.count(1), itertools.count(1)
    view = ClusterView(grace_s=10, clock=clock)
    alive: set[tuple[str, int]] = set()

    def new_life() -> Directory:
        return Directory(ClusterState(1_000 * next(lives), max_events=6), itertools.count(1))

    def watched(parts_received: int | None) -> None:
        events = directory.state.events_since(view.revision) if view.revision else None
        snapshot = events is None
        parts = split(events if events is not None else directory.state.snapshot(), directory.state.revision, snapshot)
        # As if each part could hold one event only.
        fine = [Changes(0, [event], snapshot and part is parts[0] and i == 0) for part in parts
                for i, event in enumerate(part.events)]  # fmt: skip
        fine.append(Changes(directory.state.revision, [], snapshot and not fine))
        for changes in fine[:parts_received]:
            for change in view.apply(_response(changes)):
                if isinstance(change, WorkerJoined):
                    key = (change.state.info.worker_id, change.state.info.incarnation)
                    assert key not in alive
                    alive.add(key)
                else:
                    alive.remove((change.worker_id, change.incarnation))
            assert alive == {(name, s.info.incarnation) for name, s in view.workers.items()}
            view.check_integrity()
            for worker_id in view.workers:
                assert view.candidate(worker_id) is view.candidate(worker_id)

    directory = new_life()
    leases: dict[str, tuple[int, int]] = {}
    for kind, name, numbers in steps:
        if kind == "join":
            encoded = state(name, next(incarnations))
            worker = Worker(name, encoded.info.incarnation, Role.DECODE, encoded.info.SerializeToString(), b"")
            leases[name] = directory.register(worker, 1_000, 0), 1
        elif kind == "restart":
            directory, leases = new_life(), {}
        elif kind == "watch":
            watched(None)
        elif kind == "break":
            watched(len(numbers))
        elif name in leases:
            lease_id, sequence = leases[name]
            if kind == "leave":
                directory.deregister(lease_id)
                del leases[name]
            elif kind == "load":
                load = directory_pb2.WorkerLoad(num_running=numbers[0])
                directory.keep_alive(lease_id, load.SerializeToString(), 0)
            else:
                data = b"".join(map(block, numbers))
                change = (Stored(data), Removed(data), Cleared())[numbers[0] % 3]
                leases[name] = lease_id, directory.publish_blocks(lease_id, sequence, [change], 0)
    watched(None)
    clock.now_s += 10
    watched(None)
    assert {name: s.info.SerializeToString() for name, s in view.workers.items()} == {
        worker.worker_id: worker.info for worker in directory.state.workers.values()
    }
    assert {name: s.load.SerializeToString() for name, s in view.workers.items()} == {
        worker.worker_id: worker.load for worker in directory.state.workers.values()
    }
    for n in range(6):
        expected = {worker.worker_id for worker, _ in directory.state.longest_prefix(block(n))}
        assert set(view.longest_prefix([block(n)])) == expected


def test_many_blocks_are_applied_in_steps() -> None:
    view = ClusterView()
    many = response(
        5, joined("a"), stored("a", *range(10_000)), joined("b"), *(stored("b", n) for n in range(1_000)), snapshot=True
    )
    steps = view.apply_in_steps(many)
    sizes, changes = [0], []
    for step in steps:
        assert view.revision == (5 if view.num_blocks("b") == 1_000 else 0), "a part counted for the whole"
        changes += step
        sizes.append(view.num_blocks("a") + view.num_blocks("b"))
    assert max(b - a for a, b in itertools.pairwise(sizes)) <= 2048
    assert len(sizes) > 10, "calls for a block each take time too"
    assert [change.state.info.worker_id for change in changes if isinstance(change, WorkerJoined)] == ["a", "b"]
    assert sizes[-1] == 11_000
    view.check_integrity()


def test_a_tier_of_later_versions_is_passed_over() -> None:
    view = ClusterView()
    unknown = stored("a", 2)
    unknown.blocks.events[0].tier = 9
    on_host = stored("a", 3)
    on_host.blocks.events[0].tier = directory_pb2.TIER_HOST
    view.apply(response(5, joined("a"), stored("a", 1), unknown, on_host, snapshot=True))
    assert view.longest_prefix([block(1), block(2)]) == {"a": Prefix(1, 1)}
    assert view.longest_prefix([block(3)]) == {"a": Prefix(1, 0)}


def test_a_candidate_is_as_its_worker_reported_last() -> None:
    view = ClusterView()
    view.apply(response(5, joined("a"), joined("b"), snapshot=True))
    before = {name: view.candidate(name) for name in "ab"}
    assert before["a"].num_requests == 0
    load = directory_pb2.WorkerLoad(num_running=3)
    reported: list[WorkerKey] = []
    view.on_report = reported.append
    events = [{"worker_id": "a", "incarnation": incarnation, "load": load} for incarnation in (1, 2)]
    view.apply(response(6, *(directory_pb2.Event(load=event) for event in events)))  # type: ignore[arg-type]
    assert reported == [WorkerKey("a", 1)], "the other is not there"
    assert view.candidate("a").num_requests == 3
    assert view.candidate("b") is before["b"]
    view.apply(response(7, joined("b")))
    assert reported == [WorkerKey("a", 1), WorkerKey("b", 1)], "whoever joins, even again, comes with its load"
    assert view.has(WorkerKey("b", 1))
    assert not view.has(WorkerKey("b", 2))


def test_what_a_worker_registered_is_known_for_as_long_as_it_is_there() -> None:
    view, new = ClusterView(), joined("new")
    info = new.joined.info
    info.oldest_protocol, info.newest_protocol = 2, 3
    info.paths.add(kind=directory_pb2.PATH_KIND_SHARED_MEMORY, scope="h")
    info.paths.add(kind=77)  # type: ignore[arg-type]
    info.labels.update(zone="a", host="h1")
    view.apply(response(5, joined("old"), new, snapshot=True))
    assert view.abilities("old") == Abilities()
    paths = frozenset({Path("shared memory", "h"), Path("kind 77", "")})
    assert view.abilities("new") == Abilities(Protocol(2, 3), paths)
    assert (view.place("old"), view.place("new")) == (Place(), Place("h1", "", "a"))
    assert view.candidate("new").place == Place("h1", "", "a")
    view.apply(response(6, joined("new", 2)))
    assert view.candidate("new").place == Place()
    assert (view.abilities("new"), view.place("new")) == (Abilities(), Place())
    view.apply(response(7, left("new", 2)))
    view.check_integrity()
    for ask in (view.abilities, view.candidate):
        with pytest.raises(KeyError):
            ask("new")


def test_a_full_view_says_how_much_it_left_out() -> None:
    view = ClusterView(max_index_entries=2)
    registry = CollectorRegistry()
    registry.register(ViewCollector(view))
    view.apply(response(5, joined("a"), stored("a", 1, 2, 3), snapshot=True))
    assert registry.get_sample_value("kvferry_gateway_index_entries") == 2
    assert registry.get_sample_value("kvferry_gateway_index_left_out_total") == 1


def test_metrics_say_how_old_the_view_is() -> None:
    clock = Clock()
    view, registry = ClusterView(clock=clock), CollectorRegistry()
    registry.register(ViewCollector(view))
    assert registry.get_sample_value("kvferry_gateway_view_age_seconds") == float("inf")
    view.apply(response(5, joined("a"), snapshot=True))
    clock.now_s += 31
    assert registry.get_sample_value("kvferry_gateway_view_age_seconds") == 31


@pytest.mark.parametrize(("heard_ago_s", "age_ms"), [(None, 90_000), (31.0, 31_000)])
async def test_clients_are_told_how_old_the_view_is(
    monkeypatch: pytest.MonkeyPatch, heard_ago_s: float | None, age_ms: int
) -> None:
    """One that never heard of a directory is as old as its gateway."""
    clock = Clock()
    monkeypatch.setattr("gateway.servicer.time", SimpleNamespace(monotonic=clock))
    frontend: Any = SimpleNamespace(model=common_pb2.ModelInfo(), num_in_flight=0, num_requests_total=0)
    siblings = Siblings(Memory(DecisionBook(), RecentRequests(), ServedBook(0.0), frontend))
    view = ClusterView(clock=clock)
    servicer = ClusterServicer(frontend, Doorkeeper(), view, siblings)
    clock.now_s += 90
    if heard_ago_s is not None:
        view.apply(response(5, snapshot=True))
        clock.now_s += heard_ago_s
    context: Any = SimpleNamespace(invocation_metadata=lambda: ())
    answer = await servicer.DescribeCluster(inference_pb2.DescribeClusterRequest(), context)
    assert answer.view_age_ms == age_ms


class ScriptedDirectory(directory_pb2_grpc.DirectoryServiceServicer):
    """Answers each watch from a script; an item that is no response is awaited or raised."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.from_revisions: asyncio.Queue[int] = asyncio.Queue()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[directory_pb2.WatchResponse]:
        self.from_revisions.put_nowait(request.from_revision)
        for item in self.scripts.pop(0) if self.scripts else []:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, asyncio.Event):
                await item.wait()
            else:
                yield item


@asynccontextmanager
async def watching(directory: ScriptedDirectory, view: ClusterView) -> AsyncIterator[asyncio.Queue[Any]]:
    server = create_server()
    directory_pb2_grpc.add_DirectoryServiceServicer_to_server(directory, server)
    address = f"127.0.0.1:{bind(server, '127.0.0.1:0')}"
    changes: asyncio.Queue[Any] = asyncio.Queue()
    async with running(server, grace_s=0):
        task = asyncio.create_task(watch(view, (address,), on_change=changes.put_nowait))
        try:
            yield changes
        finally:
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled(), task.exception()


async def test_a_lost_watch_resumes_where_it_was() -> None:
    ever = asyncio.Event()
    directory = ScriptedDirectory(
        [response(5, joined("a"), snapshot=True), RuntimeError("lost")],
        [response(6, stored("a", 1))],
        [response(7, joined("b")), ever],
    )
    view = ClusterView()
    async with watching(directory, view) as changes, asyncio.timeout(10):
        assert [await directory.from_revisions.get() for _ in range(3)] == [0, 5, 6]
        assert [change.state.info.worker_id for _ in range(2) for change in await changes.get()] == ["a", "b"]
        assert view.longest_prefix([block(1)]) == {"a": Prefix(1, 1)}
        assert view.revision == 7
        ever.set()


async def test_a_silent_watch_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "_SILENCE_S", 0.2)
    ever = asyncio.Event()
    directory = ScriptedDirectory([response(5, joined("a"), snapshot=True), ever], [response(6), ever])
    view = ClusterView()
    async with watching(directory, view), asyncio.timeout(10):
        assert await directory.from_revisions.get() == 0
        assert await directory.from_revisions.get() == 5
        assert names(view) == {"a"}


async def test_the_view_outlives_its_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    view = ClusterView()
    server = create_server()
    directory = ScriptedDirectory([response(5, joined("a"), snapshot=True), asyncio.Event()])
    directory_pb2_grpc.add_DirectoryServiceServicer_to_server(directory, server)
    address = f"127.0.0.1:{bind(server, '127.0.0.1:0')}"
    changes: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.create_task(watch(view, (address,), on_change=changes.put_nowait))
    monkeypatch.setattr(view_module, "_SAID_AGAIN_S", 0.2)
    warned = asyncio.Queue[dict[str, Any]]()
    monkeypatch.setattr(view_module._log, "warning", lambda event, **what: warned.put_nowait(what), raising=False)
    async with running(server, grace_s=0):
        await asyncio.wait_for(changes.get(), 10)
    ages = [(await asyncio.wait_for(warned.get(), 10))["view_age_s"] for _ in range(2)]
    assert ages[1] > ages[0]
    assert not task.done()
    assert names(view) == {"a"}
    assert 0 < view.age_s < 20
    task.cancel()
    await asyncio.wait([task])


async def test_a_watch_goes_on_at_another_directory() -> None:
    directories = [ScriptedDirectory([response(5, joined("a"), snapshot=True), asyncio.Event()]) for _ in range(2)]
    view, changes = ClusterView(), asyncio.Queue[Any]()
    async with AsyncExitStack() as stack:
        addresses, stops = [], []
        for directory in directories:
            server = create_server()
            directory_pb2_grpc.add_DirectoryServiceServicer_to_server(directory, server)
            addresses.append(f"127.0.0.1:{bind(server, '127.0.0.1:0')}")
            stops.append(await stack.enter_async_context(AsyncExitStack()))
            await stops[-1].enter_async_context(running(server, grace_s=0))
        task = asyncio.create_task(watch(view, tuple(addresses), on_change=changes.put_nowait))
        await asyncio.wait_for(changes.get(), 10)
        used = next(i for i, directory in enumerate(directories) if directory.from_revisions.qsize())
        await stops[used].aclose()
        async with asyncio.timeout(10):
            assert await directories[1 - used].from_revisions.get() == 5
        task.cancel()
        await asyncio.wait([task])
