"""Brings a worker up, part by part, and takes it down in the opposite order."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import grpc
import structlog

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import Error
from services.engine.blocks import BlockPool, CacheChange
from services.engine.copies import Copier, CopyThread
from services.engine.engine import Engine
from services.engine.host_tier import HostTier
from services.engine.kernels.packed import PackedWeights
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.model_files import open_model
from services.engine.runners import (
    WarmRunner,
    choose_cuda_dtype,
    choose_dtype,
    create_cuda_runner,
    create_host_copier,
    create_runner,
    kv_dtype,
    load_for_runner,
)
from services.engine.scheduler import Limits, Scheduler
from services.runtime.channels import Channels
from services.runtime.cpus import Cpus, format_cpus, pinned
from services.runtime.membership import Membership
from services.runtime.metrics import serve_metrics
from services.runtime.process import this_process
from services.runtime.server import add_standard_services, bind, create_server, running, split_address
from services.runtime.startup import StartupError
from services.runtime.tier import Tier
from services.worker.config import Kernels, Speculate, WorkerConfig, parse_nbytes, weights_cache_folder
from services.worker.device import choose_device
from services.worker.events import EventRouter
from services.worker.holdings import Holdings
from services.worker.metrics import publish_metrics
from services.worker.pins import PinBook
from services.worker.puller import Puller
from services.worker.servicer import StopTransfer, WorkerServicer, drain
from services.worker.worker import Identity, Worker
from transport import Region, TransportError
from transport import create as create_transport

if TYPE_CHECKING:
    from services.engine.weights import Weights

log = structlog.get_logger(__name__)

SERVER_GRACE_S = 2.0
# Pins may hold one block in so many: the others are enough to serve.
PINNED_SHARE = 4
MAX_PINS = 1024


@dataclass(frozen=True, slots=True)
class Role:
    """What sets a prefill worker and a decode worker apart."""

    kind: common_pb2.WorkerRole.ValueType
    service_name: str
    # Registers the role's servicer; yields what answers StopTransfer.
    serve: Callable[
        [grpc.aio.Server, Worker, Channels, Puller, WorkerConfig], AbstractAsyncContextManager[StopTransfer]
    ]


async def run_worker(config: WorkerConfig, role: Role) -> None:
    """Serves until cancelled; then drains, within ``config.drain_timeout_s``.  Raises StartupError."""
    async with AsyncExitStack() as stack:
        server = create_server()
        port = bind(server, config.listen)
        host, _ = split_address(config.listen)
        stack.enter_context(serve_metrics(config.metrics_port))
        worker = await stack.enter_async_context(_worker(config, role, f"{host}:{port}"))
        channels = await stack.enter_async_context(Channels())
        membership = Membership(
            config.directory, worker.info(), worker.load, _snapshot(worker), lease_ttl_s=config.lease_ttl_s
        )
        worker.router.tell_directory = lambda changes: _publish(membership, changes)
        puller = await stack.enter_async_context(Puller(worker, channels))
        stop_transfer = await stack.enter_async_context(role.serve(server, worker, channels, puller, config))
        holdings = stack.enter_context(Holdings(worker, config.pin_lifetime_s))
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(worker, stop_transfer, holdings), server)
        names = (role.service_name, worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name)
        await add_standard_services(server, names)
        worker.engine.start()
        stack.callback(worker.engine.close)
        await stack.enter_async_context(running(server, grace_s=SERVER_GRACE_S))
        await stack.enter_async_context(membership)
        publish_metrics(worker)
        log.info("ready", address=worker.identity.control_address, worker_id=worker.identity.worker_id)
        try:
            await asyncio.shield(worker.router.died)  # or the cancellation would end it, and draining with it
        except asyncio.CancelledError:
            await _drain(worker, config.drain_timeout_s)
            raise
        finally:
            worker.end_streams()


@asynccontextmanager
async def _worker(config: WorkerConfig, role: Role, address: str) -> AsyncIterator[Worker]:
    """Model, pool, transport and engine.  The engine is not started yet."""
    try:
        files = await asyncio.to_thread(open_model, config.model)
        device = choose_device(config.device)
        compiled = device is None and config.kernels is Kernels.COMPILED
        if device is None:
            dtype = await asyncio.to_thread(choose_dtype, files.config, config.dtype, compiled=compiled)
        else:
            dtype = choose_cuda_dtype(files.config, config.dtype)
        weights = await asyncio.to_thread(
            load_for_runner, files.config, files.path, dtype,
            compiled=compiled, cache_folder=weights_cache_folder(config.weights_cache),
        )  # fmt: skip
        transport = create_transport("ucx")
    except (Error, TransportError) as e:
        raise StartupError(str(e)) from e
    model = files.config
    layout = KvLayout(
        model_revision=model.revision,
        dtype=kv_dtype(dtype),
        block_size=config.block_size,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
    )
    async with AsyncExitStack() as stack:
        stack.callback(transport.close)
        num_blocks = _num_blocks(config, layout)
        try:
            # Never released: the arena's tensors live as long as the process, and the kernel takes it back with that.
            region = transport.allocate(num_blocks * layout.block_nbytes, device)
        except TransportError as e:
            raise StartupError(str(e)) from e
        cpus = config.compute_cpus
        create = partial(_create_runner, model, weights, layout, region, num_blocks, config, role)
        try:
            runner = await asyncio.to_thread(_warm_runner, create, config.threads, cpus)
        except Error as e:
            raise StartupError(str(e)) from e
        loop = asyncio.get_running_loop()
        transport.attach(loop)
        stack.callback(transport.detach)
        pool = BlockPool(num_blocks)
        limits = Limits(
            block_size=config.block_size,
            context_length=model.context_length,
            max_step_tokens=config.chunk_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            max_pinned=num_blocks // PINNED_SHARE,
            look_ahead=device is not None,
        )
        router = EventRouter(loop)
        copies = None
        if num_slots := _num_host_slots(config, layout):
            copier = await _host_copier(region, layout, num_blocks, num_slots)
            copies = stack.enter_context(CopyThread(copier, layout.block_nbytes))
        engine = Engine(Scheduler(pool, limits, HostTier(pool, num_slots)), runner, router, cpus, copies)
        role_name = common_pb2.WorkerRole.Name(role.kind).removeprefix("WORKER_ROLE_").lower()
        identity = Identity(
            worker_id=config.worker_id or f"{role_name}-{address}",
            # Time orders incarnations for a reader of logs; the random part tells apart two of one instant.
            incarnation=(time.time_ns() & ~0xFFFF) | secrets.randbits(16),
            role=role.kind,
            control_address=address,
            process=this_process(),
        )
        log.info(
            "pool",
            num_blocks=num_blocks,
            block_nbytes=layout.block_nbytes,
            layout=layout.fingerprint,
            huge_pages=region.huge_pages,
            num_host_blocks=num_slots,
        )
        pins = PinBook(pool, max_blocks=limits.max_pinned, max_pins=MAX_PINS)
        exact = isinstance(weights, PackedWeights)
        speculates = config.speculate is Speculate.ON or (config.speculate is Speculate.AUTO and exact)
        yield Worker(identity, model, layout, transport, region, engine, router, pins, speculates=speculates)


def _create_runner(model: ModelConfig, weights: Weights | PackedWeights, layout: KvLayout, region: Region,
                   num_blocks: int, config: WorkerConfig, role: Role) -> WarmRunner:  # fmt: skip
    if region.device is None or isinstance(weights, PackedWeights):
        return create_runner(model, weights, layout, region.view, num_blocks, config.threads)
    return create_cuda_runner(
        model, weights, layout, region, num_blocks, max_running=config.max_running,
        returns_early=role.kind == common_pb2.WORKER_ROLE_PREFILL,  # whose blocks no peer writes
    )  # fmt: skip


def _warm_runner(create: Callable[[], WarmRunner], threads: int, cpus: Cpus) -> WarmRunner:
    """Blocks.  The threads that it starts are on ``cpus``; the caller's stays where it was."""
    with pinned(cpus):
        runner = create()
        runner.warm_up()
    log.info("compute", threads=threads, cpus=format_cpus(cpus) or "any")
    return runner


async def _drain(worker: Worker, timeout_s: float) -> None:
    draining = asyncio.ensure_future(drain(worker))
    ended = (draining, worker.router.died)
    done, _ = await asyncio.wait(ended, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if not done:
        log.warning("drain_cut_short", timeout_s=timeout_s)
    draining.cancel()


def _num_blocks(config: WorkerConfig, layout: KvLayout) -> int:
    try:
        num_blocks = parse_nbytes(config.kv_memory) // layout.block_nbytes
    except Error as e:
        raise StartupError(f"--kv-memory: {e}") from e
    if num_blocks < 2:
        raise StartupError(
            f"--kv-memory {config.kv_memory} holds {num_blocks} KV blocks of {layout.block_nbytes} bytes; give at least "
            f"{2 * layout.block_nbytes} bytes"
        )
    return num_blocks


def _num_host_slots(config: WorkerConfig, layout: KvLayout) -> int:
    try:
        nbytes = parse_nbytes(config.host_kv_memory)
    except Error as e:
        raise StartupError(f"--host-kv-memory: {e}") from e
    if 0 < nbytes < layout.block_nbytes:
        raise StartupError(
            f"--host-kv-memory {config.host_kv_memory} holds no KV block of {layout.block_nbytes} bytes; give more, or 0"
        )
    return nbytes // layout.block_nbytes


async def _host_copier(region: Region, layout: KvLayout, num_blocks: int, num_slots: int) -> Copier:
    try:
        return await asyncio.to_thread(create_host_copier, region, layout, num_blocks, num_slots)
    except TransportError as e:
        raise StartupError(f"--host-kv-memory: {e}") from e


def _snapshot(worker: Worker) -> Callable[[], Mapping[Tier, Sequence[bytes]]]:
    def hashes() -> Mapping[Tier, Sequence[bytes]]:
        with worker.engine.exclusive(wake=False) as scheduler:
            return {Tier.DEVICE: scheduler.pool.hashes(), Tier.HOST: scheduler.host.hashes()}

    return hashes


def _publish(membership: Membership, changes: Sequence[CacheChange]) -> None:
    """Runs of changes of one kind in one tier, in order."""
    for (stored, tier), run in groupby(changes, key=lambda change: (change.stored, change.tier)):
        (membership.stored if stored else membership.removed)([change.hash for change in run], tier)
