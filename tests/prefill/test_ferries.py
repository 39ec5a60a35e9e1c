"""Whole ways of prompts between workers of unequal blocks: what arrives, what stays untouched, and what stopping waits
for."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import AbortedError, ConflictError, UnavailableError
from services.engine.layout import KvLayout
from services.engine.weights import DTYPES
from services.prefill import conversion, passage
from services.prefill.arriving import Arriving
from services.worker.holdings import Holdings
from services.worker.pins import ReaderId
from tests.prefill.two_workers import SALT, TwoWorkers, layout, sampling, side, stop_request, token_kv, two_workers
from transport import Path, PeerLost
from transport.loopback import LoopbackTransport
from transport.sockets import Connection


def expected_kv(prompt: list[int], dtypes: tuple[str, str]) -> torch.Tensor:
    """As torch rounds it, first to the writer's type and then to the owner's."""
    exact = torch.stack([token_kv(token, position) for position, token in enumerate(prompt)])
    return exact.to(DTYPES[dtypes[0]]).to(DTYPES[dtypes[1]])


async def assert_arrives(two: TwoWorkers, prompt: list[int]) -> int:
    """Returns how many tokens the owner had before."""
    owner, ours, theirs = two.owner, two.writer.worker.layout, two.owner.worker.layout
    before = [pool.clone() for pool in owner.pools]
    ticket, committed = await two.ferry(prompt)
    num_had = ticket.first_block_index * theirs.block_size
    expected = expected_kv(prompt, (ours.dtype, theirs.dtype))
    assert torch.equal(owner.kv(ticket.blocks, len(prompt) - num_had), expected[num_had:])
    for pool, was in zip(owner.pools, before, strict=True):
        others = [block for block in range(len(was)) if block not in ticket.blocks]
        assert torch.equal(pool[others].view(torch.uint8), was[others].view(torch.uint8))
    assert committed.transfer.num_blocks == len(ticket.blocks)
    assert committed.prefill.num_prompt_tokens == len(prompt)
    await two.quiet()
    return num_had


DTYPE_PAIRS = [
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "float16"),
    ("float16", "float32"),
    ("float16", "bfloat16"),
]


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 8), (8, 4), (4, 6), (5, 3), (1, 7)])
async def test_the_owners_blocks_hold_what_torch_makes_of_the_writers(
    dtypes: tuple[str, str], sizes: tuple[int, int]
) -> None:
    """Prefix hits on either side end wherever they do: inside blocks of the other, before or behind its own."""
    await assert_prompts_arrive(*(layout(dtype, size) for dtype, size in zip(dtypes, sizes, strict=True)))


@pytest.mark.parametrize(
    ("ranks", "dtypes", "sizes"),
    [
        *(((ranks, ("float32", "float32"), (4, 4))) for ranks in [(2, 1), (1, 2), (3, 1), (1, 3), (2, 3), (2, 2)]),
        ((3, 2), ("float32", "float32"), (4, 6)),
        ((3, 3), ("float32", "float32"), (6, 4)),
        *((ranks, ("float32", "bfloat16"), (4, 4)) for ranks in [(2, 1), (1, 3), (2, 3), (3, 3)]),
        ((3, 2), ("bfloat16", "float16"), (6, 4)),
    ],
)
async def test_the_owners_ranks_have_the_heads_of_the_writers(
    ranks: tuple[int, int], dtypes: tuple[str, str], sizes: tuple[int, int]
) -> None:
    """And its digests are of what they hold: every transfer here is verified."""
    await assert_prompts_arrive(*(layout(*of_side) for of_side in zip(dtypes, sizes, ranks, strict=True)))


async def assert_prompts_arrive(ours: KvLayout, theirs: KvLayout) -> None:
    chance = random.Random(f"{ours} {theirs}")
    # The third size of scratch memory holds three tokens, and so no whole block.
    convert_nbytes = chance.choice([1 << 20, 2 * theirs.block_nbytes, 3 * theirs.token_nbytes])
    num_had = []
    async with two_workers(ours, theirs, chunk=chance.randint(3, 20), convert_nbytes=convert_nbytes) as two:
        for round_ in range(4):
            prompt = [chance.randrange(100) for _ in range(chance.randint(17, 60))]
            if round_:
                await two.writer.cache(prompt[: chance.randint(8, len(prompt))])
                await two.owner.cache(prompt[: chance.randint(8, len(prompt))])
            num_had.append(await assert_arrives(two, prompt))
    assert num_had[0] == 0
    assert any(num_had), "no round began with a prefix hit"


async def test_a_prefix_of_the_owners_ends_in_the_middle_of_a_block_of_the_writers() -> None:
    prompt = list(range(50))
    async with two_workers(layout("float32", 16), layout("float32", 4)) as two:
        await two.owner.cache(prompt[:12])
        assert await assert_arrives(two, prompt) == 12
    async with two_workers(layout("float32", 4), layout("float32", 16)) as two:
        await two.writer.cache(prompt[:24])  # computed from the middle of the owner's second block on
        await two.owner.cache(prompt[:16])
        assert await assert_arrives(two, prompt) == 16


async def test_many_prompts_share_little_memory_to_convert_in() -> None:
    ours, theirs = layout("float32", 4), layout("bfloat16", 8)
    chance = random.Random(3)
    async with two_workers(ours, theirs, convert_nbytes=3 * theirs.block_nbytes) as two:
        prompts = [[chance.randrange(100) for _ in range(chance.randint(20, 40))] for _ in range(6)]
        tickets = await asyncio.gather(*(two.ferry(prompt) for prompt in prompts))
        for prompt, (ticket, _) in zip(prompts, tickets, strict=True):
            expected = expected_kv(prompt, (ours.dtype, theirs.dtype))
            assert torch.equal(two.owner.kv(ticket.blocks, len(prompt)), expected)
        await two.quiet()


class Gate:
    """Holds conversions on their thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.threads: set[str] = set()
        self._convert = conversion.convert
        monkeypatch.setattr(conversion, "convert", self._held)

    def _held(self, *arguments: Any) -> None:
        self.threads.add(threading.current_thread().name)
        self.reached.set()
        assert self.open.wait(30)
        self._convert(*arguments)

    async def wait_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 30)


async def test_stopping_waits_for_the_conversion_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    prompt = list(range(40))
    async with two_workers(layout("float32", 4), layout("bfloat16", 8)) as two, two.ticket(prompt) as (ticket, _):
        before = two.owner.pool.clone()

        async def run() -> None:
            async for _ in two.ferries.run(prompt, sampling(), ticket, SALT):
                pass

        request = asyncio.create_task(run())
        await gate.wait_reached()
        stopping = asyncio.create_task(two.ferries.stop_transfer(stop_request(ticket)))
        with pytest.raises(AbortedError, match="took its blocks back"):
            await request
        await asyncio.sleep(0.05)  # it would have said so by now
        assert not stopping.done(), "said to have stopped while a conversion reads the source"
        with two.writer.worker.engine.exclusive(wake=False) as scheduler:
            assert scheduler.pool.counts().active == 10, "the source was released under a conversion"
        assert not two.ferries.converter.is_unused
        gate.open.set()
        await asyncio.wait_for(stopping, 10)
        assert torch.equal(two.owner.pool.view(torch.uint8), before.view(torch.uint8)), "written after the stop"
        await two.writer.quiet()
    assert all(name.startswith("convert") for name in gate.threads)


async def test_a_write_that_waits_for_room_is_stopped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    theirs = layout("bfloat16", 4)
    async with two_workers(layout("float32", 4), theirs, convert_nbytes=theirs.block_nbytes) as two:
        first = asyncio.create_task(two.ferry(list(range(16))))
        await gate.wait_reached()
        async with two.ticket(list(range(50, 66))) as (ticket, _):
            steps = two.ferries.run(list(range(50, 66)), sampling(), ticket, SALT)
            assert (await anext(steps)).id == 7  # computed, and now it waits for room
            await asyncio.wait_for(two.ferries.stop_transfer(stop_request(ticket)), 5)
            await steps.aclose()
        assert not gate.open.is_set()
        gate.open.set()
        await asyncio.wait_for(first, 10)
        await two.quiet()


async def test_scratch_memory_is_held_until_its_write_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(10))
    async with two_workers(layout("float32", 4), layout("bfloat16", 4)) as two, two.ticket(prompt) as (ticket, _):
        writing, may_write = threading.Event(), threading.Event()
        copy = LoopbackTransport._copy

        def held(self: LoopbackTransport, job: Any) -> Any:
            writing.set()
            assert may_write.wait(30)
            return copy(self, job)

        monkeypatch.setattr(LoopbackTransport, "_copy", held)
        steps = two.ferries.run(prompt, sampling(), ticket, SALT)
        await anext(steps)
        assert await asyncio.to_thread(writing.wait, 30)
        stopping = asyncio.create_task(two.ferries.stop_transfer(stop_request(ticket)))
        await asyncio.sleep(0.05)  # it would have said so by now
        assert not stopping.done()
        assert not two.ferries.converter.is_unused, "given back while a write reads it"
        may_write.set()
        await asyncio.wait_for(stopping, 10)
        await steps.aclose()
        await two.writer.quiet()


async def test_a_conversion_that_fails_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_workers(layout("float32", 4), layout("bfloat16", 4)) as two:
        with monkeypatch.context() as broken:
            broken.setattr(conversion, "convert", lambda *_: 1 / 0)
            async with two.ticket([1, 2, 3]) as (ticket, _):
                with pytest.raises(AbortedError, match="division by zero"):
                    async for _ in two.ferries.run([1, 2, 3], sampling(), ticket, SALT):
                        pass
        await assert_arrives(two, [4, 5, 6])


@pytest.mark.parametrize("change", [{"fingerprint": "f" * 32}, {"dtype": "float64"}, {"block_size_tokens": 0}])
async def test_other_content_is_refused_with_both_layouts_named(change: dict[str, Any]) -> None:
    async with two_workers(layout("float32", 4), layout("bfloat16", 8)) as two, two.ticket([1, 2, 3]) as (ticket, _):
        for name, value in change.items():
            setattr(ticket.layout, name, value)
        with pytest.raises(ConflictError) as refused:
            await anext(two.ferries.run([1, 2, 3], sampling(), ticket, SALT))
    assert refused.value.reason == "LAYOUTS_DIFFER"
    assert two.writer.worker.layout.fingerprint in refused.value.message
    assert ticket.layout.fingerprint in refused.value.message


@pytest.mark.parametrize("change", [{"blocks": [0, 60]}, {"blocks": [5, 5]}, {"expires_in_ms": 0}])
async def test_a_ticket_that_cannot_be_used_is_refused_before_anything_is_computed(change: dict[str, Any]) -> None:
    """Outside the owner's pool of 60 blocks, one block twice, or too late."""
    prompt = list(range(8))
    async with two_workers(layout("float32", 4), layout("float32", 4)) as two, two.ticket(prompt) as (ticket, _):
        before = two.owner.pool.clone()
        for name, value in change.items():
            ticket.ClearField(name)
            ticket.MergeFrom(worker_pb2.Ticket(**{name: value}))
        with pytest.raises(
            ConflictError, match=r"outside its owner's pool of 60, or one of them twice|expired"
        ) as refused:
            await anext(two.ferries.run(prompt, sampling(), ticket, SALT))
        assert refused.value.reason == "TICKET_REFUSED"
        assert two.writer.worker.engine.work.prefill_tokens == 0
        assert torch.equal(two.owner.pool.view(torch.uint8), before.view(torch.uint8))
        await two.writer.quiet()


async def test_a_ticket_expires_by_its_receipt_however_long_opening_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(8))
    async with two_workers(layout("float32", 4), layout("float32", 4)) as two, two.ticket(prompt) as (ticket, _):
        ticket.expires_in_ms = 50
        opened = LoopbackTransport.open

        def slowly(self: LoopbackTransport, descriptor: bytes) -> Any:
            time.sleep(0.1)
            return opened(self, descriptor)

        monkeypatch.setattr(LoopbackTransport, "open", slowly)
        with pytest.raises(ConflictError, match=r"expired 0\.\d+ s before the first write"):
            await anext(two.ferries.run(prompt, sampling(), ticket, SALT))
        await two.writer.quiet()


@pytest.mark.parametrize("how", ["expired", "left"])
async def test_a_request_that_expires_or_is_left_writes_no_more_and_its_owner_is_told(how: str) -> None:
    """Whatever becomes of the gateway."""
    prompt = list(range(40))
    async with two_workers(layout("float32", 4), layout("float32", 4)) as two, two.ticket(prompt) as (ticket, call):
        before = two.owner.pool.clone()
        if how == "expired":
            ticket.expires_in_ms = 200
        two.writer.runner.may_run.clear()
        steps = two.ferries.run(prompt, sampling(), ticket, SALT)
        first = asyncio.ensure_future(anext(steps))
        while not two.ferries._passages:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        if how == "left":
            first.cancel()
            await asyncio.wait((first,))
        else:
            with pytest.raises(AbortedError, match="the ticket expired"):
                await asyncio.wait_for(first, 10)
        two.writer.runner.may_run.set()
        with pytest.raises(AbortedError, match="the writer gave up"):
            await call.next()
        assert torch.equal(two.owner.pool.view(torch.uint8), before.view(torch.uint8))
        await two.quiet()


@pytest.mark.parametrize("change", [{"owner_id": "decode-9"}, {"owner_incarnation": 9}, {"epoch": 9}])
async def test_only_its_owner_stops_a_transfer(change: dict[str, Any]) -> None:
    prompt = list(range(8))
    async with two_workers(layout("float32", 4), layout("float32", 4)) as two, two.ticket(prompt) as (ticket, _):
        steps = two.ferries.run(prompt, sampling(), ticket, SALT)
        await anext(steps)
        request = stop_request(ticket)
        for name, value in change.items():
            setattr(request, name, value)
        with pytest.raises(ConflictError, match=f"is of {ticket.owner_id}/{ticket.owner_incarnation}, epoch"):
            await two.ferries.stop_transfer(request)
        assert isinstance(await anext(steps), worker_pb2.Committed)


async def test_who_asks_to_stop_hears_in_time_that_a_write_hangs_and_may_ask_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.prefill.ferries.STOP_WAIT_S", 0.05)
    gate = Gate(monkeypatch)
    prompt = list(range(40))
    async with two_workers(layout("float32", 4), layout("bfloat16", 8)) as two, two.ticket(prompt) as (ticket, _):
        steps = two.ferries.run(prompt, sampling(), ticket, SALT)
        await anext(steps)
        await gate.wait_reached()
        with pytest.raises(UnavailableError, match="has not ended after") as caught:
            await two.ferries.stop_transfer(stop_request(ticket))
        assert caught.value.reason == "NOT_STOPPED_YET"
        gate.open.set()
        monkeypatch.setattr("services.prefill.ferries.STOP_WAIT_S", 10.0)
        await two.ferries.stop_transfer(stop_request(ticket))
        await steps.aclose()
        await two.writer.quiet()


async def test_what_a_broken_connection_may_still_bring_keeps_the_owner_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_its_way = {Connection("here", "there")}
    broken = PeerLost("the connection broke")
    monkeypatch.setattr(LoopbackTransport, "_obstacle", lambda *_: broken)
    monkeypatch.setattr(passage, "Path", SimpleNamespace(RMA=Path.LOOPBACK))
    monkeypatch.setattr(passage, "Arriving", lambda: Arriving(lambda: set(on_its_way)))
    prompt = list(range(8))
    async with two_workers(layout("float32", 4), layout("float32", 4)) as two, two.ticket(prompt) as (ticket, _):
        with pytest.raises(UnavailableError, match="the connection broke") as lost:
            async for _ in two.ferries.run(prompt, sampling(), ticket, SALT):
                pass
        assert lost.value.reason == "OWNER_LOST"
        for _ in range(3):
            with pytest.raises(UnavailableError, match="may still arrive"):
                await two.ferries.stop_transfer(stop_request(ticket))
        on_its_way.clear()
        await two.ferries.stop_transfer(stop_request(ticket))
        await two.writer.quiet()


async def test_a_passage_that_fails_to_clean_up_has_stopped_nonetheless(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(8))
    async with two_workers(layout("float32", 4), layout("float32", 4)) as two, two.ticket(prompt) as (ticket, _):
        steps = two.ferries.run(prompt, sampling(), ticket, SALT)
        await anext(steps)
        with monkeypatch.context() as broken:
            broken.setattr(two.writer.worker.router, "unsubscribe", lambda *_: 1 / 0)
            with suppress(ZeroDivisionError):
                await two.ferries.stop_transfer(stop_request(ticket))
            with suppress(ZeroDivisionError):
                await steps.aclose()
        await asyncio.wait_for(two.ferries.stop_transfer(stop_request(ticket)), 2)


async def test_a_ticket_with_too_few_regions_is_refused() -> None:
    prompt = list(range(20))
    async with two_workers(layout("float32", 4), layout("float32", 4, 2)) as two, two.ticket(prompt) as (ticket, _):
        del ticket.further_regions[:]
        with pytest.raises(ConflictError, match="names 1 regions for 2 ranks"):
            await anext(two.ferries.run(prompt, sampling(), ticket, SALT))


async def test_blocks_of_several_ranks_are_pinned_for_nobody() -> None:
    async with side(common_pb2.WORKER_ROLE_DECODE, "", layout("float32", 4, 2), 8) as decode:
        with Holdings(decode.worker, 30.0) as holdings, pytest.raises(ConflictError, match="lie on 2 ranks"):
            holdings.pin([bytes(16)], ReaderId("prefill-0", 1), 1.0)
        assert decode.worker.load().num_pinnable_blocks == 0, "a gateway sends nobody to read here"
