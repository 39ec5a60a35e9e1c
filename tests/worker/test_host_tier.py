"""A worker whose pool is too small for what it is asked, over a host tier."""

from __future__ import annotations

import asyncio

import pytest

from kvferry.api.common.v1 import common_pb2
from kvferry.errors import InvalidRequestError
from services.engine.copies import CopyThread
from services.engine.hashing import chain_root, extend_chain
from services.runtime.startup import StartupError
from services.runtime.tier import Tier
from services.worker.config import WorkerConfig
from services.worker.node import _num_host_slots, _snapshot
from services.worker.servicer import drain
from services.worker.worker import Worker
from tests.engine.test_copies import WAIT_S, Gate, wait_until
from tests.worker.tiny import LAYOUT, MODEL, SAMPLING, make_worker
from transport import create

PROMPT = list(range(20))


def ask(worker: Worker, name: str, prompt: list[int]) -> None:
    worker.add(worker.make_sequence(name, list(prompt), SAMPLING, b""))


async def test_a_worker_drains_when_the_last_copy_for_a_request_that_was_given_up_has_ended() -> None:
    gate = Gate()
    gate.open.set()
    with create("loopback") as transport, CopyThread(gate, LAYOUT.block_nbytes) as copies:
        worker = make_worker(transport, "d", common_pb2.WORKER_ROLE_DECODE, num_host_slots=40, copies=copies)
        engine = worker.engine
        hashes = extend_chain(chain_root(MODEL.revision), PROMPT, LAYOUT.block_size)
        ask(worker, "first", PROMPT)
        while engine.step():
            pass
        wait_until(engine, lambda: all(map(engine._scheduler.host.holds, hashes)))
        for i in (30, 50, 70):
            ask(worker, f"other {i}", list(range(i, i + 20)))
            while engine.step():
                pass
        gate.open.clear()
        gate.entered.clear()
        sequence = worker.make_sequence("again", list(PROMPT), SAMPLING, b"")
        worker.add(sequence)
        assert not engine.step(), "it waits for its copy"
        assert await asyncio.to_thread(gate.entered.wait, WAIT_S)
        with engine.exclusive() as scheduler:
            assert sequence.is_loading
            scheduler.abort(sequence.id)
        draining = asyncio.create_task(drain(worker))
        await asyncio.sleep(0.05)
        assert not draining.done()
        gate.open.set()
        async with asyncio.timeout(WAIT_S):
            await draining
        assert worker.integrity_ok()
        assert worker.load().num_host_blocks == len(_snapshot(worker)()[Tier.HOST]) > 0


@pytest.mark.parametrize(("text", "num_slots"), [("0", 0), (f"{5 * LAYOUT.block_nbytes + 1}", 5)])
def test_host_memory_is_counted_in_blocks(text: str, num_slots: int) -> None:
    assert _num_host_slots(WorkerConfig(host_kv_memory=text), LAYOUT) == num_slots


@pytest.mark.parametrize("text", [f"{LAYOUT.block_nbytes - 1}", "much"])
def test_host_memory_that_holds_nothing_is_refused(text: str) -> None:
    with pytest.raises(StartupError, match="--host-kv-memory") as error:
        _num_host_slots(WorkerConfig(host_kv_memory=text), LAYOUT)
    assert isinstance(error.value.__cause__, InvalidRequestError | None)
