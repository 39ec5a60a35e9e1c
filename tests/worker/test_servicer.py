"""What a worker answers when it is asked to stop a transfer: the answer lets an owner use blocks again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import ConflictError, UnavailableError
from services.runtime.process import ProcessIdentity, this_process
from services.worker.servicer import WorkerServicer
from services.worker.worker import Worker
from tests.worker.tiny import NO_PROCESS, make_worker
from transport import create


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    with create("loopback") as transport:
        yield make_worker(transport, "prefill-0", common_pb2.WORKER_ROLE_PREFILL)


async def ask(worker: Worker, writer_id: str, incarnation: int, process: ProcessIdentity) -> list[str]:
    """The transfers that the worker stopped."""
    stopped: list[str] = []

    async def stop(request: worker_pb2.StopTransferRequest) -> None:
        await asyncio.sleep(0)
        stopped.append(request.transfer_id)

    servicer = WorkerServicer(worker, stop, None)  # type: ignore[arg-type]
    request = worker_pb2.StopTransferRequest(
        transfer_id="t", writer_id=writer_id, writer_incarnation=incarnation, writer_process=process.to_proto()
    )
    answer = await servicer.StopTransfer(request, None)  # type: ignore[arg-type]
    assert answer.incarnation == worker.identity.incarnation
    return stopped


async def test_the_writer_itself_answers_once_it_has_stopped(worker: Worker) -> None:
    assert await ask(worker, "prefill-0", 1, this_process()) == ["t"]


async def test_a_successor_answers_for_a_process_that_has_ended_or_cannot_be_seen(worker: Worker) -> None:
    here = this_process()
    ended = ProcessIdentity(here.boot_id, here.pid_namespace, here.pid, here.start_time_ticks - 1)
    assert await ask(worker, "prefill-0", 7, ended) == []
    assert await ask(worker, "prefill-0", 7, NO_PROCESS) == []


async def test_a_successor_does_not_answer_for_a_process_that_still_runs(worker: Worker) -> None:
    with pytest.raises(UnavailableError, match="still runs"):
        await ask(worker, "prefill-0", 7, this_process())


async def test_another_worker_does_not_answer(worker: Worker) -> None:
    with pytest.raises(ConflictError, match="this is prefill-0"):
        await ask(worker, "prefill-1", 1, NO_PROCESS)
