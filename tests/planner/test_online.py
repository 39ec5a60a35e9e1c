"""The online planner as a service: a real directory, and workers that a test plays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from prometheus_client import REGISTRY

from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2, directory_pb2_grpc
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.directory.memory_store import MemoryStore
from services.directory.servicer import DirectoryServicer
from services.planner.online.__main__ import run
from services.planner.online.config import PlannerConfig
from services.runtime.membership import Membership
from services.runtime.server import bind, create_server, running

PREFILL, DECODE = common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE
BUSY_SHARE = {PREFILL: 0.95, DECODE: 0.0}


class Played(worker_pb2_grpc.WorkerServiceServicer):
    """Its time goes where its role's goes."""

    def __init__(self, name: str, role: common_pb2.WorkerRole.ValueType) -> None:
        self.info = directory_pb2.WorkerInfo(
            worker_id=name, incarnation=1, role=role, control_address="", model=common_pb2.ModelInfo(name="m"),
            layout=common_pb2.Layout(fingerprint="f", block_size_tokens=16, block_nbytes=64),
        )  # fmt: skip
        self.asked: asyncio.Queue[int] = asyncio.Queue()
        self.began_s = time.monotonic()

    def load(self) -> directory_pb2.WorkerLoad:
        lived_s, share = time.monotonic() - self.began_s, BUSY_SHARE[self.info.role]
        seconds = {directory_pb2.PHASE_PREFILL: share, directory_pb2.PHASE_IDLE: 1 - share}
        return directory_pb2.WorkerLoad(
            phases=[directory_pb2.PhaseLoad(phase=phase, seconds=part * lived_s) for phase, part in seconds.items()]
        )

    async def ChangeRole(self, request: worker_pb2.ChangeRoleRequest, context: Any) -> worker_pb2.ChangeRoleResponse:
        await self.asked.put(request.role)
        return worker_pb2.ChangeRoleResponse()


@asynccontextmanager
async def played() -> AsyncIterator[tuple[str, dict[str, Played]]]:
    """A prefill worker that is full and two decode workers that have nothing to do, in a directory at the address."""
    async with MemoryStore() as store, AsyncExitStack() as stack:
        server = create_server()
        directory_pb2_grpc.add_DirectoryServiceServicer_to_server(DirectoryServicer(store), server)
        address = f"127.0.0.1:{bind(server, '127.0.0.1:0')}"
        await stack.enter_async_context(running(server, grace_s=0.1))
        workers = {name: Played(name, role) for name, role in (("p0", PREFILL), ("d0", DECODE), ("d1", DECODE))}
        for worker in workers.values():
            server = create_server()
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
            worker.info.control_address = f"127.0.0.1:{bind(server, '127.0.0.1:0')}"
            await stack.enter_async_context(running(server, grace_s=0.1))
            membership = Membership((address,), worker.info, worker.load, dict, lease_ttl_s=1.0)
            await stack.enter_async_context(membership)
        yield address, workers
        store.watchers.close()


@pytest.mark.parametrize("apply", [True, False])
async def test_it_asks_an_idle_worker_to_change_its_role_only_where_it_may(apply: bool) -> None:
    def num_said() -> float:
        return REGISTRY.get_sample_value("kvferry_planner_steps_total", {"step": "move", "outcome": "said"}) or 0.0

    said_before = num_said()
    async with played() as (address, workers):
        settings = PlannerConfig(directory=(address,), apply=apply, look_every_s=0.1, window_s=5.0, patience=2)
        planning = asyncio.create_task(run(settings))
        asked = asyncio.create_task(workers["d0"].asked.get())
        try:
            done, _ = await asyncio.wait([planning, asked], timeout=60 if apply else 8, return_when="FIRST_COMPLETED")
            assert planning not in done
            assert [task.result() for task in done] == ([PREFILL] if apply else [])
            assert (num_said() > said_before) is not apply
            assert workers["p0"].asked.empty()
            assert workers["d1"].asked.empty()
        finally:
            for task in (planning, asked):
                task.cancel()
            await asyncio.wait([planning, asked])
