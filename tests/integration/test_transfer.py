"""The KV bytes travel by one-sided operations, and the answer depends on them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from kvferry import Client
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.decode_calls import DecodeCall
from tests.integration.conftest import Running
from transport import Op, create

PROMPT = "The quick brown fox jumps over the lazy dog, and nobody knows why it does so every single day. " * 3


def test_both_sides_count_the_same_blocks_and_bytes(cluster: Running, client: Client) -> None:
    before = cluster.stats("prefill-0"), cluster.stats("decode-0")
    answer = client.generate(f"Counting blocks. {PROMPT}", max_tokens=4, temperature=0).result()
    after = cluster.stats("prefill-0"), cluster.stats("decode-0")
    layout = after[0].state.info.layout
    num_tokens = answer.usage.num_prompt_tokens
    num_blocks = -(-num_tokens // layout.block_size_tokens)
    assert layout.block_nbytes == 30 * 2 * 16 * 3 * 64 * 4
    written = after[0].num_blocks_written - before[0].num_blocks_written
    received = after[1].num_blocks_received - before[1].num_blocks_received
    assert written == received == answer.timeline.transfer.num_blocks == num_blocks
    written_bytes = after[0].num_bytes_written - before[0].num_bytes_written
    received_bytes = after[1].num_bytes_received - before[1].num_bytes_received
    assert written_bytes == received_bytes == answer.timeline.transfer.num_bytes == num_blocks * layout.block_nbytes
    assert answer.timeline.transfer.path == "mapped"
    assert after[1].num_prefill_tokens == before[1].num_prefill_tokens, "the decode worker computed no prompt"


class Proxy(worker_pb2_grpc.DecodeServiceServicer):
    """Stands between a writer's commit and the pool's owner."""

    def __init__(self, owner: worker_pb2_grpc.DecodeServiceStub, before_commit: Callable[[], Awaitable[None]]) -> None:
        self._owner = owner
        self._before_commit = before_commit

    async def CommitTransfer(self, request: worker_pb2.CommitTransferRequest, context: Any) -> Any:
        await self._before_commit()
        try:
            return await self._owner.CommitTransfer(request, timeout=10)
        except grpc.aio.AioRpcError as e:
            await context.abort(e.code(), e.details() or "", tuple(e.trailing_metadata()))

    async def AbortTransfer(self, request: worker_pb2.AbortTransferRequest, context: Any) -> Any:
        return await self._owner.AbortTransfer(request, timeout=10)


class Handmade:
    """A split request driven by the test instead of a gateway, with its hand on the commit."""

    def __init__(self, cluster: Running, prompt: Sequence[int], salt: bytes) -> None:
        self.cluster = cluster
        self.prompt = list(prompt)
        self.salt = salt
        self.sampling = common_pb2.SamplingParams(
            max_tokens=24, temperature=0, top_p=1, top_k=0, seed=0, ignore_eos=True
        )
        self.ticket = worker_pb2.Ticket()
        self.at_commit = asyncio.Event()
        self.go_on = asyncio.Event()

    async def _hold(self) -> None:
        self.at_commit.set()
        await asyncio.wait_for(self.go_on.wait(), 30)

    @asynccontextmanager
    async def begun(self) -> AsyncIterator[tuple[DecodeCall, Any]]:
        """(decode call, prefill call), with the ticket's commit going by way of the proxy."""
        prefill_info = self.cluster.info("prefill-0")
        async with (
            grpc.aio.insecure_channel(self.cluster.local.address("prefill-0")) as to_prefill,
            grpc.aio.insecure_channel(self.cluster.local.address("decode-0")) as to_decode,
            AsyncExitStack() as stack,
        ):
            owner = worker_pb2_grpc.DecodeServiceStub(to_decode)
            server = grpc.aio.server()
            stack.push_async_callback(server.stop, 0)
            worker_pb2_grpc.add_DecodeServiceServicer_to_server(Proxy(owner, self._hold), server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            decode = DecodeCall(
                to_decode,
                worker_pb2.DecodeOpen(
                    request_id="handmade",
                    prompt_token_ids=self.prompt,
                    sampling=self.sampling,
                    cache_salt=self.salt,
                    writer=worker_pb2.Writer(
                        worker_id=prefill_info.worker_id,
                        incarnation=prefill_info.incarnation,
                        control_address=prefill_info.control_address,
                        process=prefill_info.process,
                    ),
                ),
                60,
            )
            self.ticket.CopyFrom((await decode.next()).ticket)
            proxied = worker_pb2.Ticket()
            proxied.CopyFrom(self.ticket)
            proxied.owner_control_address = f"127.0.0.1:{port}"
            prefill = worker_pb2_grpc.PrefillServiceStub(to_prefill).Prefill(
                worker_pb2.PrefillRequest(
                    request_id="handmade",
                    prompt_token_ids=self.prompt,
                    sampling=self.sampling,
                    ticket=proxied,
                    cache_salt=self.salt,
                ),
                timeout=60,
            )
            try:
                yield decode, prefill
            finally:
                self.go_on.set()
                decode.cancel()
                prefill.cancel()

    async def tokens(self, tamper: Callable[[worker_pb2.Ticket], None]) -> list[int]:
        async with self.begun() as (decode, prefill):
            reader = asyncio.create_task(_drain(prefill))
            await asyncio.wait_for(self.at_commit.wait(), 30)
            await asyncio.to_thread(tamper, self.ticket)
            self.go_on.set()
            tokens = []
            async for event in decode:
                if event.HasField("token"):
                    tokens.append(event.token.id)
            await reader
            return tokens


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


def overwrite_block(ticket: worker_pb2.Ticket, number: int) -> None:
    """Writes noise over one block of the ticket, as a peer that means no good would."""
    nbytes = ticket.layout.block_nbytes
    with create("ucx") as transport, transport.allocate(nbytes) as region:
        region.view[:] = b"\x3f" * nbytes
        with transport.open(ticket.region) as remote:
            transfer = transport.post(Op.WRITE, region, remote, [0], [ticket.blocks[number] * nbytes], [nbytes])
            transfer.wait(10)


async def test_one_corrupted_block_changes_the_answer(cluster: Running, client: Client) -> None:
    """So a recompute that hid a broken transfer would be noticed."""
    prompt = list(client.tokenize(PROMPT))
    honest = await Handmade(cluster, prompt, b"honest").tokens(lambda ticket: None)
    assert len(honest) == 24
    corrupted = await Handmade(cluster, prompt, b"corrupted").tokens(lambda ticket: overwrite_block(ticket, 1))
    assert len(corrupted) == 24
    assert corrupted[0] == honest[0], "the first token was drawn by the writer"
    assert corrupted != honest
    again = await Handmade(cluster, prompt, b"honest again").tokens(lambda ticket: None)
    assert again == honest


async def test_a_ticket_works_once_and_for_its_writer_only(cluster: Running, client: Client) -> None:
    handmade = Handmade(cluster, client.tokenize(PROMPT), b"once")
    async with (
        handmade.begun() as (decode, prefill),
        grpc.aio.insecure_channel(cluster.local.address("prefill-0")) as to_prefill,
        grpc.aio.insecure_channel(cluster.local.address("decode-0")) as to_decode,
    ):
        reader = asyncio.create_task(_drain(prefill))
        await asyncio.wait_for(handmade.at_commit.wait(), 30)
        ticket = handmade.ticket
        owner = worker_pb2_grpc.DecodeServiceStub(to_decode)
        real = {
            "transfer_id": ticket.transfer_id, "epoch": ticket.epoch, "owner_incarnation": ticket.owner_incarnation,
            "writer_id": ticket.writer_id, "writer_incarnation": ticket.writer_incarnation,
            "num_blocks": len(ticket.blocks), "num_bytes": len(ticket.blocks) * ticket.layout.block_nbytes,
            "num_tokens": ticket.num_prompt_tokens,
        }  # fmt: skip
        for change in ({"epoch": 999}, {"writer_id": "mallory"}, {"writer_incarnation": 1}, {"owner_incarnation": 1}):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await owner.CommitTransfer(worker_pb2.CommitTransferRequest(**{**real, **change}), timeout=10)
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        handmade.go_on.set()
        num_tokens = 0
        async for event in decode:
            num_tokens += event.HasField("token")
        assert num_tokens == 24, "messages in another's name changed nothing"
        await reader
        again = worker_pb2_grpc.PrefillServiceStub(to_prefill).Prefill(
            worker_pb2.PrefillRequest(prompt_token_ids=handmade.prompt, sampling=handmade.sampling, ticket=ticket),
            timeout=10,
        )
        written = cluster.stats("prefill-0").num_bytes_written
        with pytest.raises(grpc.aio.AioRpcError, match="used or stopped before"):
            await _drain(again)
        assert cluster.stats("prefill-0").num_bytes_written == written


async def test_cancelling_while_the_transfer_is_under_way(cluster: Running, client: Client) -> None:
    handmade = Handmade(cluster, client.tokenize(PROMPT), b"cancelled")
    async with handmade.begun() as (decode, prefill):
        reader = asyncio.create_task(_drain(prefill))
        await asyncio.wait_for(handmade.at_commit.wait(), 30)
        assert cluster.stats("decode-0").state.load.blocks.lent == len(handmade.ticket.blocks)
        decode.cancel()
        await asyncio.to_thread(cluster.assert_settles)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await reader
        assert refused.value.code() is grpc.StatusCode.ABORTED


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"writer_incarnation": 1}, "is for writer"),
        ({"writer_id": "prefill-9"}, "is for writer"),
        ({"num_prompt_tokens": 3}, "is for 3 tokens"),
        ({"first_block_index": 1}, "the ticket names blocks"),
    ],
)
async def test_a_ticket_that_is_not_for_this_is_refused_before_a_byte_moves(
    cluster: Running, client: Client, change: dict[str, Any], says: str
) -> None:
    before = cluster.stats("prefill-0").num_bytes_written
    info = cluster.info("prefill-0")
    prompt = list(client.tokenize(PROMPT))
    ticket = worker_pb2.Ticket(
        transfer_id="made up",
        writer_id=info.worker_id,
        writer_incarnation=info.incarnation,
        layout=info.layout,
        num_prompt_tokens=len(prompt),
        blocks=range(-(-len(prompt) // 16)),
        expires_in_ms=1000,
    )
    for name, value in change.items():
        setattr(ticket, name, value)
    async with grpc.aio.insecure_channel(cluster.local.address("prefill-0")) as channel:
        call = worker_pb2_grpc.PrefillServiceStub(channel).Prefill(
            worker_pb2.PrefillRequest(
                prompt_token_ids=prompt,
                sampling=common_pb2.SamplingParams(max_tokens=4, temperature=0, top_p=1, top_k=0, seed=0),
                ticket=ticket,
            ),
            timeout=10,
        )
        with pytest.raises(grpc.aio.AioRpcError, match=says) as refused:
            await _drain(call)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert cluster.stats("prefill-0").num_bytes_written == before


async def test_unequal_layouts_are_refused_with_both_named(cluster: Running, client: Client) -> None:
    info = cluster.info("prefill-0")
    layout = common_pb2.Layout(fingerprint="another", block_size_tokens=32, block_nbytes=1, dtype="bfloat16")
    ticket = worker_pb2.Ticket(writer_id=info.worker_id, writer_incarnation=info.incarnation, layout=layout)
    async with grpc.aio.insecure_channel(cluster.local.address("prefill-0")) as channel:
        call = worker_pb2_grpc.PrefillServiceStub(channel).Prefill(
            worker_pb2.PrefillRequest(prompt_token_ids=[1], ticket=ticket), timeout=10
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _drain(call)
    assert "another" in (refused.value.details() or "")
    assert info.layout.fingerprint in (refused.value.details() or "")
