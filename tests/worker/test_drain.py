"""A worker that is told to take no more work: what it says, and what it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvferry.api.common.v1 import common_pb2
from kvferry.errors import UnavailableError
from services.engine.hashing import chain_root, extend_chain
from services.worker.holdings import Holdings
from services.worker.pins import ReaderId
from services.worker.servicer import drain
from services.worker.worker import Worker
from tests.worker.tiny import LAYOUT, MODEL, SAMPLING, make_worker
from transport import create

PROMPT = list(range(12))
READER = ReaderId("decode-1", 1)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    with create("loopback") as transport:
        yield make_worker(transport, "decode-0", common_pb2.WORKER_ROLE_DECODE)


async def test_it_says_so_at_once_and_waits_for_the_last_pin_and_grants_no_more(worker: Worker) -> None:
    told: list[bool] = []
    ended: list[str] = []

    async def tell_draining() -> None:
        ended.append("ready")

    worker.report_load = lambda: told.append(worker.load().draining)
    worker.tell_draining = tell_draining
    worker.add(worker.make_sequence("r", PROMPT, SAMPLING, b""))
    while worker.engine.step():
        pass
    hashes = extend_chain(chain_root(MODEL.revision), PROMPT, LAYOUT.block_size)
    with Holdings(worker, 30.0) as holdings:
        pins = [holdings.pin(hashes, READER, 30.0) for _ in range(2)]
        draining = asyncio.create_task(drain(worker))
        await asyncio.sleep(0.01)
        assert (told, ended) == ([True], ["ready"])
        with pytest.raises(UnavailableError, match="is draining"):
            holdings.pin(hashes, READER, 30.0)
        for pin in pins:
            assert pin is not None
            assert not draining.done()
            assert holdings.release(pin.id, READER)
            await asyncio.sleep(0.01)
        await asyncio.wait_for(draining, 5)
        assert worker.integrity_ok()
