"""Brings a worker up, part by part, and takes it down in the opposite order."""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
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
from services.engine.layout import KvLayout
from services.engine.model_files import open_model
from services.engine.parallel.shard import Shard
from services.engine.phase_book import PhaseBook
from services.engine.phases import ModelShape
from services.engine.runners import (
    choose_cuda_dtype,
    choose_dtype,
    create_host_copier,
    kv_dtype,
)
from services.engine.scheduler import Limits, Scheduler
from services.runtime import garbage
from services.runtime.channels import Channels
from services.runtime.membership import Membership
from services.runtime.metrics import serve_metrics
from services.runtime.probes import serve_probes
from services.runtime.process import this_process
from services.runtime.server import add_standard_services, bind, create_inner_server, running, set_ready, split_address
from services.runtime.startup import StartupError
from services.runtime.tier import Tier
from services.worker.compute import Compute
from services.worker.config import Speculate, WorkerConfig, parse_nbytes
from services.worker.device import choose_devices
from services.worker.events import EventRouter
from services.worker.holdings import Holdings
from services.worker.labels import parse_labels
from services.worker.metrics import publish_metrics
from services.worker.pins import MAX_PINS, PINNED_SHARE, PinBook
from services.worker.puller import Puller
from services.worker.pulse import watched
from services.worker.ranks import RankLostError
from services.worker.servicer import StopTransfer, WorkerServicer, drain
from services.worker.worker import Identity, Worker
from transport import Region, TransportError
from transport import create as create_transport
from transport.interfaces import devices_at
from transport.reach import look_at_reach

if TYPE_CHECKING:
    pass

log = structlog.get_logger(__name__)

SERVER_GRACE_S = 2.0
# Of a process that ended because it had slept through its lease (EX_TEMPFAIL): whoever supervises it starts it again.
FENCED_STATUS = 75
# Of one whose transport moves nothing any more (EX_SOFTWARE).
STUCK_STATUS = 70


@dataclass(frozen=True, slots=True)
class Role:
    """What sets a prefill worker and a decode worker apart."""

    kind: common_pb2.WorkerRole.ValueType
    service_name: str
    # Registers the role's servicer; yields what answers StopTransfer, of the role that writes.
    serve: Callable[
        [grpc.aio.Server, Worker, Channels, Puller, WorkerConfig], AbstractAsyncContextManager[StopTransfer | None]
    ]


async def run_worker(config: WorkerConfig, role: Role, other: Role) -> None:
    """Serves as ``role``, or as ``other`` once it is told to, until cancelled; then drains, within
    ``config.drain_timeout_s``.  Raises StartupError."""
    async with AsyncExitStack() as stack:
        certificates = config.certificates(config.listen)
        server, credentials = create_inner_server(certificates)
        port = bind(server, config.listen, credentials=credentials)
        host, _ = split_address(config.listen)
        stack.enter_context(serve_metrics(config.metrics_port, host=config.metrics_host))
        worker = await stack.enter_async_context(_worker(config, role, f"{host}:{port}"))
        channels = await stack.enter_async_context(Channels(certificates))
        membership = Membership(
            config.directory,
            worker.info(),
            worker.load,
            _snapshot(worker),
            lease_ttl_s=config.lease_ttl_s,
            certificates=certificates,
            on_slept=_end_fenced,
        )
        worker.router.tell_directory = lambda changes: _publish(membership, changes)
        puller = await stack.enter_async_context(Puller(worker, channels))
        stops = [
            await stack.enter_async_context(each.serve(server, worker, channels, puller, config))
            for each in (role, other)
        ]
        (stop_transfer,) = filter(None, stops)
        holdings = stack.enter_context(Holdings(worker, config.pin_lifetime_s))
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(worker, stop_transfer, holdings), server)
        names = (
            role.service_name,
            other.service_name,
            worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,
        )
        health = await add_standard_services(server, names)
        worker.tell_draining = lambda: set_ready(health, names, False)
        worker.engine.start()
        stack.callback(worker.engine.close)
        await stack.enter_async_context(serve_probes(health, config.listen, config.health_port))
        await stack.enter_async_context(running(server, grace_s=SERVER_GRACE_S))
        await stack.enter_async_context(membership)
        worker.report_load = membership.report
        worker.register_anew = lambda: membership.describe(worker.info())
        publish_metrics(worker)
        garbage.settle()
        log.info("ready", address=worker.identity.control_address, worker_id=worker.identity.worker_id)
        try:
            await asyncio.shield(worker.router.died)  # or the cancellation would end it, and draining with it
        except RankLostError as e:
            raise StartupError(str(e)) from e
        except asyncio.CancelledError:
            await _drain(worker, config.drain_timeout_s)
            raise
        finally:
            worker.end_streams()


def _confine_ucx(host: str) -> None:
    """By itself UCX listens on every interface, and lets in whoever reaches it (SECURITY.md): who does not reach the gRPC
    server has no business with the pool."""
    if "UCX_NET_DEVICES" not in os.environ and (devices := devices_at(host)) is not None:
        os.environ["UCX_NET_DEVICES"] = devices
    log.info("kv_network", devices=os.environ.get("UCX_NET_DEVICES", "every interface"))


@asynccontextmanager
async def _worker(config: WorkerConfig, role: Role, address: str) -> AsyncIterator[Worker]:
    """Model, pool, transport and engine.  The engine is not started yet."""
    try:
        files = await asyncio.to_thread(open_model, config.model)
        model = files.config
        Shard.of(model, 0, config.tp)  # or it cannot be cut so
        devices = choose_devices(config.device, config.tp, compiled=config.compiled)
        on_gpu = devices[0] is not None
        if on_gpu:
            dtype = choose_cuda_dtype(model, config.dtype, compiled=config.compiled)
        else:
            dtype = await asyncio.to_thread(
                choose_dtype, model, config.dtype, compiled=config.compiled and config.tp == 1
            )
        _confine_ucx(split_address(config.listen)[0])
        transport = create_transport("ucx")
    except (Error, TransportError) as e:
        raise StartupError(str(e)) from e
    layout = KvLayout(
        model_revision=model.revision,
        dtype=kv_dtype(dtype),
        block_size=config.block_size,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        tp=config.tp,
    )
    role_name = common_pb2.WorkerRole.Name(role.kind).removeprefix("WORKER_ROLE_").lower()
    loop = asyncio.get_running_loop()
    router = EventRouter(loop)
    async with AsyncExitStack() as stack:
        stack.callback(transport.close)
        num_blocks = _num_blocks(config, layout)
        by_flashinfer = on_gpu and config.compiled
        returns_early = by_flashinfer and role.kind == common_pb2.WORKER_ROLE_PREFILL  # whose blocks no peer writes
        try:
            # Never released: the arena's tensors live as long as the process, and the kernel takes it back with that.
            region, *further_regions = [
                transport.allocate(num_blocks * layout.of_rank(rank).block_nbytes, device)
                for rank, device in enumerate(devices)
            ]
            compute = Compute(
                files, dtype, layout, (region, *further_regions), num_blocks, config,
                log_name=config.worker_id or role_name,
                returns_early=returns_early,
            )  # fmt: skip
            ceilings = await compute.ceilings()
            runner, exact, weight_nbytes = await compute.start(stack, router.on_death)
        except (Error, TransportError) as e:
            raise StartupError(str(e)) from e
        transport.attach(loop)
        stack.callback(transport.detach)
        stack.enter_context(watched(transport.pulse, _end_stuck))
        pool = BlockPool(num_blocks)
        limits = Limits(
            block_size=config.block_size,
            context_length=model.context_length,
            max_step_tokens=config.num_step_tokens(on_gpu=on_gpu),
            max_mixed_tokens=config.num_mixed_tokens(on_gpu=on_gpu),
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            max_pinned=num_blocks // PINNED_SHARE,
            look_ahead=by_flashinfer,
        )
        copies = None
        if num_slots := _num_host_slots(config, layout):
            copier = await _host_copier(region, layout, num_blocks, num_slots)
            copies = stack.enter_context(CopyThread(copier, layout.block_nbytes))
        scheduler = Scheduler(pool, limits, HostTier(pool, num_slots))
        phases = PhaseBook(ModelShape.of(model, weight_nbytes, layout.dtype), ceilings, time.monotonic())
        engine = Engine(scheduler, runner, router, config.compute_cpus, copies, phases)
        identity = Identity(
            worker_id=config.worker_id or f"{role_name}-{address}",
            # Time orders incarnations for a reader of logs; the random part tells apart two of one instant.
            incarnation=(time.time_ns() & ~0xFFFF) | secrets.randbits(16),
            role=role.kind,
            control_address=address,
            process=this_process(),
        )
        paths = look_at_reach(on_gpu=on_gpu)
        log.info(
            "pool",
            num_blocks=num_blocks,
            block_nbytes=layout.block_nbytes,
            layout=layout.fingerprint,
            huge_pages=region.huge_pages,
            num_host_blocks=num_slots,
            paths=[f"{path.way}:{path.scope}" for path in paths],
        )
        pins = PinBook(pool, max_blocks=limits.max_pinned, max_pins=MAX_PINS)
        speculates = config.speculate is Speculate.ON or (config.speculate is Speculate.AUTO and exact)
        yield Worker(
            identity, model, layout, transport, region, engine, router, pins,
            further_regions=tuple(further_regions), speculates=speculates, paths=paths,
            labels={"host": platform.node(), **parse_labels(config.label)},
            holds_role="its steps on a GPU return while they run" if returns_early else "",
        )  # fmt: skip


async def _drain(worker: Worker, timeout_s: float) -> None:
    draining = asyncio.ensure_future(drain(worker))
    ended = (draining, worker.router.died)
    done, _ = await asyncio.wait(ended, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if not done:
        log.warning("drain_cut_short", timeout_s=timeout_s)
    draining.cancel()


def _end_fenced(slept_s: float) -> None:
    """The end of the process is what all others take as proof that it writes, reads and decodes no more.  Nothing else
    would say so as surely, or as soon."""
    log.warning("fenced", slept_s=round(slept_s, 1), why="this process was stopped for longer than its lease")
    os._exit(FENCED_STATUS)


def _end_stuck(why: str) -> None:
    """As of a worker that is fenced: everybody knows what to do about a process that has ended.  Whatever waits for the
    transport's thread, the shutdown too, would wait for ever."""
    log.critical("transport_stuck", why=why)
    os._exit(STUCK_STATUS)


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
    if nbytes and layout.tp > 1:
        raise StartupError(f"--host-kv-memory is for a pool of one rank; leave it out with --tp {layout.tp}")
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
