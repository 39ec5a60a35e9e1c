"""Ready is who would find a decode worker, whatever the view still believes."""

from __future__ import annotations

import asyncio

import pytest

from gateway.readiness import Readiness
from gateway.view import ClusterView
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from services.runtime.channels import Channels
from tests.gateway.played import playing

REVISION = "rev-1"
DECODE, PREFILL = common_pb2.WORKER_ROLE_DECODE, common_pb2.WORKER_ROLE_PREFILL


def join(view: ClusterView, address: str, role: common_pb2.WorkerRole.ValueType = DECODE, **change: object) -> None:
    info = directory_pb2.WorkerInfo(
        worker_id=f"at {address}", incarnation=1, role=role, control_address=address,
        model=common_pb2.ModelInfo(revision=str(change.get("revision", REVISION))),
        oldest_protocol=int(str(change.get("protocol", 1))), newest_protocol=int(str(change.get("protocol", 1))),
    )  # fmt: skip
    load = directory_pb2.WorkerLoad(draining=bool(change.get("draining", False)))
    joined = directory_pb2.Event(joined=directory_pb2.WorkerState(info=info, load=load))
    view.apply(directory_pb2.WatchResponse(revision=1, events=[joined]))


async def until(readiness: Readiness, ready: bool) -> None:
    for _ in range(1000):
        if readiness.look() is ready:
            return
        await asyncio.sleep(0.02)
    raise TimeoutError(f"never {ready}")


async def test_a_worker_that_died_while_the_directory_was_away_serves_nobody() -> None:
    view = ClusterView()
    async with Channels() as channels, asyncio.timeout(30):
        readiness = Readiness(view, REVISION, channels.get)
        assert not readiness.look()
        async with playing() as (_, gone):
            join(view, gone)
            assert readiness.look()
            await channels.get(gone).channel_ready()
            assert readiness.look()
        await until(readiness, False)
        for _ in range(20):  # trying again is no sign of life
            assert not readiness.look()
            await asyncio.sleep(0.05)
        async with playing() as (_, other):
            join(view, other)
            assert readiness.look()
            await channels.get(other).channel_ready()
            assert readiness.look()


@pytest.mark.parametrize(
    ("role", "change"), [(PREFILL, {}), (DECODE, {"revision": "another"}), (DECODE, {"protocol": 9}),
                         (DECODE, {"draining": True})],
)  # fmt: skip
async def test_a_worker_that_would_not_be_chosen_does_not_count(role: int, change: dict[str, object]) -> None:
    view = ClusterView()
    async with playing() as (_, address), Channels() as channels:
        join(view, address, common_pb2.WorkerRole.ValueType(role), **change)
        assert not Readiness(view, REVISION, channels.get).look()
