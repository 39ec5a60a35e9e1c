"""A writer that owes digests: what its commit waits for, and what it never sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import AbortedError
from services.prefill.conversion import Converter
from services.prefill.ferries import Ferries
from services.runtime.channels import Channels
from services.worker.puller import Puller
from services.worker.worker import Worker
from tests.prefill.two_workers import stop_request
from tests.worker.tiny import LAYOUT, SAMPLING, HeldDigester, make_worker
from transport import Region, Transport, create

PROMPT = list(range(10))
VERIFY_US = 5_000_000


@dataclass(slots=True)
class Owner(worker_pb2_grpc.DecodeServiceServicer):
    """Accepts whatever it is told, and remembers it."""

    commits: list[worker_pb2.CommitTransferRequest] = field(default_factory=list)
    aborted: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def CommitTransfer(
        self, request: worker_pb2.CommitTransferRequest, context: Any
    ) -> worker_pb2.CommitTransferResponse:
        self.commits.append(request)
        return worker_pb2.CommitTransferResponse(verify_us=VERIFY_US)

    async def AbortTransfer(
        self, request: worker_pb2.AbortTransferRequest, context: Any
    ) -> worker_pb2.AbortTransferResponse:
        self.aborted.set_result(request.reason)
        return worker_pb2.AbortTransferResponse()


@pytest.fixture
def owners_region() -> Iterator[Region]:
    with create("loopback") as transport, transport.allocate(16 * LAYOUT.block_nbytes) as region:
        yield region


@pytest.fixture
async def transport() -> AsyncIterator[Transport]:
    with create("loopback") as transport:
        transport.attach(asyncio.get_running_loop())
        yield transport
        transport.detach()


@pytest.fixture
async def worker(transport: Transport) -> AsyncIterator[Worker]:
    worker = make_worker(transport, "prefill-0", common_pb2.WORKER_ROLE_PREFILL)
    worker.engine.start()
    yield worker
    await asyncio.to_thread(worker.engine.close)
    assert worker.integrity_ok()
    assert worker.is_idle()


@pytest.fixture
async def digester() -> HeldDigester:
    return HeldDigester()


@pytest.fixture
async def ferries(worker: Worker, digester: HeldDigester) -> AsyncIterator[Ferries]:
    scratch = worker.transport.allocate(LAYOUT.block_nbytes)
    async with Channels() as channels, Puller(worker, channels) as puller:
        with closing(Converter(worker.regions, scratch)) as converter:
            async with Ferries(worker, channels, puller, converter, digester) as ferries:  # type: ignore[arg-type]
                yield ferries


@pytest.fixture
async def owner() -> Owner:
    return Owner()


@pytest.fixture
async def ticket(owner: Owner, owners_region: Region) -> AsyncIterator[worker_pb2.Ticket]:
    """For blocks 1 and 2 of three: the owner holds the first one."""
    server = grpc.aio.server()
    worker_pb2_grpc.add_DecodeServiceServicer_to_server(owner, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    layout = common_pb2.Layout(
        fingerprint=LAYOUT.fingerprint, block_size_tokens=4, block_nbytes=LAYOUT.block_nbytes, dtype=LAYOUT.dtype
    )
    yield worker_pb2.Ticket(
        transfer_id="t", request_id="r", epoch=1, owner_id="decode-0", owner_incarnation=1,
        owner_control_address=f"127.0.0.1:{port}", writer_id="prefill-0", writer_incarnation=1,
        region=owners_region.descriptor, layout=layout, first_block_index=1, blocks=[9, 4],
        num_prompt_tokens=len(PROMPT), expires_in_ms=60_000, verify=True,
    )  # fmt: skip
    await server.stop(None)


async def until_all_is_written(ferries: Ferries) -> None:
    async with asyncio.timeout(10):
        while ferries.worker.traffic.blocks_written < 2:  # noqa: ASYNC110  (nothing announces it)
            await asyncio.sleep(0.001)


async def test_the_first_token_does_not_wait_for_the_digests_and_the_commit_does(
    ferries: Ferries, digester: HeldDigester, ticket: worker_pb2.Ticket, owner: Owner
) -> None:
    async with aclosing(ferries.run(list(PROMPT), SAMPLING, ticket, b"")) as steps:
        first = await anext(steps)
        assert isinstance(first, common_pb2.Token)
        await until_all_is_written(ferries)
        assert digester.begun == [((1,), 1, 10), ((2,), 2, 10)], "its own blocks, as each chunk was computed"
        await asyncio.sleep(0.02)
        assert owner.commits == []
        digester.found[1].set_result([22])
        digester.found[0].set_result([11])
        committed = await anext(steps)
        assert isinstance(committed, worker_pb2.Committed)
        assert [list(c.block_digests) for c in owner.commits] == [[11, 22]]
        assert committed.transfer.verify_us >= VERIFY_US + 20_000, "what digests and owner took together"


async def test_a_ticket_that_asks_for_none_gets_none(
    ferries: Ferries, digester: HeldDigester, ticket: worker_pb2.Ticket, owner: Owner
) -> None:
    ticket.verify = False
    async with aclosing(ferries.run(list(PROMPT), SAMPLING, ticket, b"")) as steps:
        async for _ in steps:
            pass
    assert digester.begun == []
    assert [list(c.block_digests) for c in owner.commits] == [[]]


@pytest.mark.parametrize("digested_at_last", [False, True])
async def test_a_transfer_that_was_stopped_is_never_committed(
    ferries: Ferries, digester: HeldDigester, ticket: worker_pb2.Ticket, owner: Owner, digested_at_last: bool
) -> None:
    """Its blocks may be somebody else's, and so the digests may be of anything."""
    async with aclosing(ferries.run(list(PROMPT), SAMPLING, ticket, b"")) as steps:
        await anext(steps)
        await until_all_is_written(ferries)
        if digested_at_last:  # in the very turn of the loop in which it is stopped
            for found in digester.found:
                found.set_result([0])
        await ferries.stop_transfer(stop_request(ticket))
        with pytest.raises(AbortedError):
            await anext(steps)
    assert all(found.cancelled() != digested_at_last for found in digester.found), "nobody wants it any more"
    assert "took its blocks back" in await asyncio.wait_for(owner.aborted, 10)
    assert owner.commits == []


async def test_digests_that_cannot_be_had_end_the_transfer(
    ferries: Ferries, digester: HeldDigester, ticket: worker_pb2.Ticket, owner: Owner
) -> None:
    async with aclosing(ferries.run(list(PROMPT), SAMPLING, ticket, b"")) as steps:
        await anext(steps)
        await until_all_is_written(ferries)
        digester.found[0].set_exception(MemoryError("none left"))
        digester.found[1].set_result([0])
        with pytest.raises(AbortedError, match="could not be digested: none left"):
            await anext(steps)
        assert await asyncio.wait_for(owner.aborted, 10) == "digesting failed: none left"
    assert owner.commits == []
