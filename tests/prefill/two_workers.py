"""A prefill and a decode worker in one process: all that is real but the model, the transport and the network between
pools.  The made-up model's KV is a function of token and position, so what should be in any block is known."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass

import grpc
import numpy as np
import torch

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.decode.reservations import Reservations, Terms
from services.decode.servicer import DecodeServicer
from services.engine.batch import Batch
from services.engine.blocks import BlockPool
from services.engine.engine import Engine
from services.engine.hashing import chain_root
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.ready import Ready
from services.engine.sampling_params import Drawn
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import Sequence as EngineSequence
from services.engine.sequence import SequenceId
from services.engine.steps import Blocking, Draws
from services.engine.weights import DTYPES
from services.prefill.conversion import Converter
from services.prefill.ferries import Ferries
from services.runtime.channels import Channels
from services.runtime.process import this_process
from services.worker.convert import to_sequence
from services.worker.digester import Digester
from services.worker.events import EventRouter
from services.worker.pins import PinBook
from services.worker.puller import Puller
from services.worker.share import Share
from services.worker.worker import Identity, Worker
from tests.decode_calls import DecodeCall
from transport import create

MODEL = ModelConfig(
    name="made-up", revision="r", architecture="llama", hidden_size=8, num_layers=2, num_heads=3, num_kv_heads=3,
    head_dim=4, intermediate_size=8, vocab_size=100, context_length=200, norm_eps=1e-5, rope_theta=1e4,
    rope_scaling=None, sliding_window=None, qkv_bias=False, tied_embeddings=True, bos_token_id=None, eos_token_ids=(),
)  # fmt: skip
NUM_BLOCKS = 60
SALT = b"salt"
QUIET_TIMEOUT_S = 10.0


def layout(dtype: str, block_size: int, tp: int = 1) -> KvLayout:
    return KvLayout(MODEL.revision, dtype, block_size, MODEL.num_layers, MODEL.num_kv_heads, MODEL.head_dim, tp)


def token_kv(token: int, position: int) -> torch.Tensor:
    """[layer, key or value, head, dim] in float32, with every bit of the fraction in use."""
    random = np.random.default_rng((token, position))
    values = random.standard_normal((MODEL.num_layers, 2, MODEL.num_kv_heads, MODEL.head_dim), np.float32)
    return torch.from_numpy(values)


class MadeUpRunner:
    runs_ahead = False
    ready: Ready | None = None

    def __init__(self, pools: Sequence[torch.Tensor]) -> None:
        """One for each rank, with its heads."""
        self._pools = pools
        self.may_run = threading.Event()
        self.may_run.set()

    def start(self, batch: Batch) -> Blocking:
        return Blocking(lambda: self.run(batch), lambda: self.ready)

    def run(self, batch: Batch) -> Draws:
        assert self.may_run.wait(30)
        size = self._pools[0].shape[3]
        for token, position, slot in zip(batch.token_ids, batch.positions, batch.slots, strict=True):
            kv = token_kv(int(token), int(position))
            heads = kv.split_with_sizes([pool.shape[4] for pool in self._pools], dim=2)
            for pool, part in zip(self._pools, heads, strict=True):
                pool[int(slot) // size, :, :, int(slot) % size] = part
        return [Drawn(7) for _ in batch.samples]


@dataclass(slots=True, eq=False)
class Side:
    worker: Worker
    pools: list[torch.Tensor]  # one for each rank
    runner: MadeUpRunner

    @property
    def pool(self) -> torch.Tensor:
        (pool,) = self.pools
        return pool

    def kv(self, blocks: Sequence[int], num_tokens: int) -> torch.Tensor:
        """[token, layer, key or value, head, dim] of what is in these blocks."""
        whole = torch.cat([pool[list(blocks)] for pool in self.pools], dim=4)
        return whole.movedim(3, 1).flatten(0, 1)[:num_tokens]

    def alone(self, prompt: Sequence[int]) -> EngineSequence:
        """Computed and answered here, whatever the worker's role is."""
        return to_sequence(
            SequenceId(f"alone/{time.monotonic_ns():x}"), list(prompt), sampling(),
            chain_root=chain_root(MODEL.revision, SALT),
            eos_ids=frozenset(MODEL.eos_token_ids), vocab_size=MODEL.vocab_size, context_length=MODEL.context_length,
            prefill_only=False, speculate=False,
        )  # fmt: skip

    async def cache(self, prompt: Sequence[int]) -> None:
        """Leaves the prompt's full blocks in the prefix cache."""
        self.worker.add(self.alone(prompt))
        await self.worker.idle()

    async def quiet(self) -> None:
        """Nothing is held, or no longer once the step under way has ended."""
        async with asyncio.timeout(QUIET_TIMEOUT_S):
            await self.worker.idle()
        assert self.worker.integrity_ok()
        with self.worker.engine.exclusive(wake=False) as scheduler:
            assert scheduler.pool.counts().active == 0


@asynccontextmanager
async def side(role: common_pb2.WorkerRole.ValueType, address: str, own: KvLayout, chunk: int) -> AsyncIterator[Side]:
    async with AsyncExitStack() as stack:
        transport = stack.enter_context(create("loopback"))
        layouts = [own.of_rank(rank) for rank in range(own.tp)]
        regions = [transport.allocate(NUM_BLOCKS * of_rank.block_nbytes) for of_rank in layouts]
        pools = [
            torch.frombuffer(region.view, dtype=DTYPES[own.dtype]).view(NUM_BLOCKS, *of_rank.block_shape)
            for region, of_rank in zip(regions, layouts, strict=True)
        ]
        for pool in pools:
            pool.fill_(float("nan"))
        loop = asyncio.get_running_loop()
        transport.attach(loop)
        stack.callback(transport.detach)
        runner = MadeUpRunner(pools)
        router = EventRouter(loop)
        limits = Limits(own.block_size, MODEL.context_length, max_step_tokens=chunk)
        blocks = BlockPool(NUM_BLOCKS)
        engine = Engine(Scheduler(blocks, limits), runner, router)
        pins = PinBook(blocks, max_blocks=4, max_pins=4)
        identity = Identity(common_pb2.WorkerRole.Name(role), 1, role, address, this_process())
        engine.start()
        stack.callback(engine.close)
        worker = Worker(
            identity, MODEL, own, transport, regions[0], engine, router, pins, further_regions=tuple(regions[1:])
        )
        yield Side(worker, pools, runner)


def stop_request(ticket: worker_pb2.Ticket) -> worker_pb2.StopTransferRequest:
    """As the ticket's owner would ask."""
    return worker_pb2.StopTransferRequest(
        transfer_id=ticket.transfer_id, epoch=ticket.epoch, owner_id=ticket.owner_id,
        owner_incarnation=ticket.owner_incarnation, writer_id=ticket.writer_id,
        writer_incarnation=ticket.writer_incarnation,
    )  # fmt: skip


def sampling() -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(max_tokens=1, temperature=0, top_p=1, top_k=0, seed=0)


@dataclass(slots=True, eq=False)
class TwoWorkers:
    writer: Side
    owner: Side
    ferries: Ferries
    to_owner: grpc.aio.Channel

    @asynccontextmanager
    async def ticket(self, prompt: Sequence[int]) -> AsyncIterator[tuple[worker_pb2.Ticket, DecodeCall]]:
        identity = self.writer.worker.identity
        # Names no process of its own, for that would be the owner's, which lives.
        writer = worker_pb2.Writer(worker_id=identity.worker_id, incarnation=identity.incarnation, control_address="")
        request = worker_pb2.DecodeOpen(
            request_id="r", prompt_token_ids=prompt, sampling=sampling(), cache_salt=SALT, writer=writer
        )
        call = DecodeCall(self.to_owner, request, 30)
        try:
            yield (await call.next()).ticket, call
        finally:
            call.cancel()

    async def ferry(self, prompt: Sequence[int]) -> tuple[worker_pb2.Ticket, worker_pb2.Committed]:
        """The whole way of a prompt, to the owner's acceptance and its end there."""
        async with self.ticket(prompt) as (ticket, call):
            items = [item async for item in self.ferries.run(list(prompt), sampling(), ticket, SALT)]
            first_token, committed = items
            assert first_token.id == (await call.next()).token.id == 7
            assert (await call.next()).HasField("finished")
            return ticket, committed

    async def quiet(self) -> None:
        await self.writer.quiet()
        await self.owner.quiet()


@asynccontextmanager
async def two_workers(
    writers: KvLayout, owners: KvLayout, *, chunk: int = 16, convert_nbytes: int = 1 << 20
) -> AsyncIterator[TwoWorkers]:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        channels = await enter(Channels())
        server = grpc.aio.server()
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        owner = await enter(side(common_pb2.WORKER_ROLE_DECODE, address, owners, chunk))
        writer = await enter(side(common_pb2.WORKER_ROLE_PREFILL, "", writers, chunk))
        checker = stack.enter_context(Digester(owner.worker))
        terms = Terms(ticket_lifetime_s=60.0, verified=Share.parse("all"), pair_quarantine_s=60.0)
        reservations = await enter(
            Reservations(owner.worker, channels, await enter(Puller(owner.worker, channels)), checker, terms)
        )
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(owner.worker, reservations), server)
        await server.start()
        stack.push_async_callback(server.stop, 0)
        region = writer.worker.transport.allocate(convert_nbytes)
        converter = stack.enter_context(closing(Converter(writer.worker.regions, region)))
        digester = stack.enter_context(Digester(writer.worker))
        puller = await enter(Puller(writer.worker, channels))
        ferries = await enter(Ferries(writer.worker, channels, puller, converter, digester))
        yield TwoWorkers(writer, owner, ferries, channels.get(address))
