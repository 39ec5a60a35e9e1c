"""A worker that goes on in the other role: when it may, and what it is until then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvferry.api.common.v1 import common_pb2
from kvferry.errors import ConflictError, InvalidRequestError, UnavailableError
from services.worker.role_change import change_role
from services.worker.servicer import drain
from services.worker.worker import Worker
from tests.worker.tiny import make_worker
from transport import create

PREFILL, DECODE = common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE
PARAMS = common_pb2.SamplingParams(max_tokens=2, temperature=0, top_p=1, top_k=0, seed=1)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    with create("loopback") as transport:
        yield make_worker(transport, "decode-0", DECODE)


def takes(worker: Worker, *, prefill_only: bool) -> bool:
    try:
        worker.make_sequence("r", [1, 2, 3], PARAMS, b"", prefill_only=prefill_only)
    except UnavailableError:
        return False
    return True


async def test_it_takes_the_work_of_its_role_alone_and_tells_what_it_is(worker: Worker) -> None:
    told: list[int] = []

    async def tell() -> None:
        told.append(worker.info().role)

    worker.register_anew = tell
    assert (takes(worker, prefill_only=True), takes(worker, prefill_only=False)) == (False, True)
    await change_role(worker, PREFILL)
    assert (takes(worker, prefill_only=True), takes(worker, prefill_only=False)) == (True, False)
    await change_role(worker, PREFILL)
    await change_role(worker, DECODE)
    assert (takes(worker, prefill_only=True), takes(worker, prefill_only=False)) == (False, True)
    assert told == [PREFILL, DECODE]


async def test_it_finishes_first_and_takes_nothing_meanwhile(worker: Worker) -> None:
    ended: list[str] = []
    worker.end_streams = lambda: ended.append("streams")
    worker.num_opening = 1
    changing = asyncio.create_task(change_role(worker, PREFILL))
    await asyncio.sleep(0)
    assert worker.load().draining
    assert not takes(worker, prefill_only=False)
    assert not takes(worker, prefill_only=True)
    with pytest.raises(ConflictError, match="changing its role already"):
        await change_role(worker, PREFILL)
    assert worker.info().role == DECODE
    assert not ended
    worker.num_opening = 0
    worker.router.changed.set()
    await changing
    assert (worker.info().role, ended) == (PREFILL, ["streams"])
    assert not worker.load().draining


async def test_who_gives_up_leaves_it_as_it_was(worker: Worker) -> None:
    worker.num_opening = 1
    changing = asyncio.create_task(change_role(worker, PREFILL))
    await asyncio.sleep(0)
    changing.cancel()
    await asyncio.wait([changing])
    assert worker.info().role == DECODE
    assert takes(worker, prefill_only=False)


async def test_a_worker_that_is_told_to_stop_meanwhile_takes_no_work_again(worker: Worker) -> None:
    worker.num_opening = 1
    changing = asyncio.create_task(change_role(worker, PREFILL))
    draining = asyncio.create_task(drain(worker))
    await asyncio.sleep(0)
    worker.num_opening = 0
    worker.router.changed.set()
    with pytest.raises(ConflictError, match="told to stop"):
        await changing
    await draining
    assert worker.load().draining
    with pytest.raises(ConflictError, match="draining"):
        await change_role(worker, PREFILL)


async def test_what_cannot_be_is_refused(worker: Worker) -> None:
    with pytest.raises(InvalidRequestError):
        await change_role(worker, common_pb2.WORKER_ROLE_UNSPECIFIED)
    await change_role(worker, PREFILL)
    worker.holds_role = "its steps on a GPU return while they run"
    with pytest.raises(ConflictError, match="stays a prefill worker: its steps on a GPU"):
        await change_role(worker, DECODE)
