"""One process of a gateway: its parts, and how they start and end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import structlog

from gateway.config import GatewayConfig
from gateway.dispatch import Dispatcher
from gateway.doorkeeper import Doorkeeper, follow, read_keys
from gateway.frontend import Frontend
from gateway.http.app import create_app
from gateway.http.dashboard import Dashboard
from gateway.http.front_door import Vocabulary
from gateway.http.limits import HttpLimits
from gateway.http.server import HttpServer
from gateway.link import DecodeLinks
from gateway.metrics import registry_of
from gateway.readiness import Readiness
from gateway.retry_budget import RetryBudget
from gateway.rpc.server import RpcServer
from gateway.seat import Seat
from gateway.servicer import ClusterServicer, InferenceServicer
from gateway.shared_quotas import SharedQuotas
from gateway.siblings import Memory, meeting
from gateway.tenants import KeyFileError
from gateway.view import Change, ClusterView, watch
from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc
from kvferry.errors import Error
from services.directory.library import IndexUnavailable
from services.engine.model_files import open_model
from services.runtime import garbage
from services.runtime.channels import Channels
from services.runtime.probes import serve_probes
from services.runtime.server import (
    add_standard_services,
    running,
    set_ready,
    split_address,
)
from services.runtime.startup import StartupError

log = structlog.get_logger(__name__)

SERVER_GRACE_S = 2.0
# That a worker is lost while the directory is away, only the connection to it tells.
LOOK_AGAIN_S = 1.0
# So few that a look for garbage takes some milliseconds.
QUIET_REQUESTS = 32
# Of a worker's stream, a step or a few: what it has to say beyond that gathers there, in one message instead of many, and
# does not grow old on the way.
WORKER_WINDOW_NBYTES = 8192
# How long a process waits for its view of the cluster before it takes connections from others that have one.
FIRST_VIEW_S = 2.0


async def run_gateway(
    config: GatewayConfig, seat: Seat | None = None, on_listening: Callable[[], None] = lambda: None
) -> None:
    """Serves until cancelled; then lets running requests finish, within ``config.drain_timeout_s``.  With a ``seat`` as one
    of several processes, which listens once it can serve.  Raises StartupError."""
    shares = seat is not None
    async with AsyncExitStack() as stack:
        certificates, shown = config.both_certificates()
        server = RpcServer(write_timeout_s=config.write_timeout_s)
        if not shares:  # early, for what is wrong with the address is known at once
            server.bind(config.listen, certificates=shown)
        try:
            files = await asyncio.to_thread(open_model, config.model)
            view = ClusterView(max_index_entries=config.max_index_entries)
            doorkeeper = Doorkeeper(read_keys(config.api_keys) if config.api_keys else None)
        except (Error, IndexUnavailable, KeyFileError) as e:
            raise StartupError(str(e)) from e
        channels = await stack.enter_async_context(Channels(certificates, window_nbytes=WORKER_WINDOW_NBYTES))
        registry = registry_of(view, seat)
        links = await stack.enter_async_context(DecodeLinks(channels))
        dispatcher = Dispatcher(
            view, channels, links, model_revision=files.config.revision, routing=config.routing,
            min_ship_tokens=config.min_ship_tokens, max_attempts=config.max_attempts,
            stall_timeout_s=config.stall_timeout_s, stall_weight=config.stall_weight,
            eos_token_ids=files.config.eos_token_ids,
            budget=RetryBudget(config.retry_ratio, num_sharers=seat.count if seat else 1),
            objectives=config.objectives,
        )  # fmt: skip
        frontend = Frontend(
            files, Readiness(view, files.config.revision, channels.get), dispatcher,
            max_requests=config.max_requests, max_request_s=config.max_request_s,
            quotas=None if seat is None else SharedQuotas(seat),
        )  # fmt: skip
        siblings = await stack.enter_async_context(
            meeting(Memory(dispatcher.decisions, frontend.recent, frontend.served, frontend), seat)
        )
        services: Any = server  # generated code asks for a grpc.aio.Server, and uses less of it
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(frontend, doorkeeper), services)
        inference_pb2_grpc.add_ClusterServiceServicer_to_server(
            ClusterServicer(frontend, doorkeeper, view, siblings), services
        )
        names = [s.full_name for s in inference_pb2.DESCRIPTOR.services_by_name.values()]
        health = await add_standard_services(server, names)

        membership_changed = asyncio.Event()

        async def report_health() -> None:
            """SERVING for as long as a request would find workers."""
            said = None
            while True:
                if (ready := frontend.ready) is not said:
                    said = ready
                    await set_ready(health, names, ready)
                    log.info("readiness", ready=ready)
                membership_changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN_S):  # wait_for may keep a cancellation to itself
                        await membership_changed.wait()

        await set_ready(health, names, False)
        vocabulary = Vocabulary(text=frontend.token_text, bytes=files.tokenizer.token_bytes)
        limits = HttpLimits(max_body_nbytes=config.max_body_nbytes, max_timeout_s=config.max_request_s,
                            write_timeout_s=config.write_timeout_s)  # fmt: skip
        dashboard = Dashboard(view, siblings, model=files.config.name, registry=registry)
        app = create_app(frontend, vocabulary=vocabulary, limits=limits, doorkeeper=doorkeeper, dashboard=dashboard,
                         registry=registry)  # fmt: skip
        http = HttpServer(app, shown)

        def on_change(changes: list[Change]) -> None:
            membership_changed.set()
            dispatcher.members_changed(changes)

        following = asyncio.create_task(watch(view, config.directory, on_change=on_change, certificates=certificates))
        stack.callback(following.cancel)
        if shares:
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_VIEW_S):
                    while not frontend.ready:
                        membership_changed.clear()
                        await membership_changed.wait()
            server.bind(config.listen, certificates=shown, share_port=True)
            await set_ready(health, names, frontend.ready)
        await stack.enter_async_context(serve_probes(health, config.listen, config.health_port, share_port=shares))
        await stack.enter_async_context(running(server, grace_s=SERVER_GRACE_S))
        await http.start(*split_address(config.http_listen), flag="--http-listen", share_port=shares)
        stack.push_async_callback(http.stop, SERVER_GRACE_S)
        # Entered last: what goes wrong before is a StartupError and not a group of them.
        background = await stack.enter_async_context(asyncio.TaskGroup())

        async def follow_on() -> None:
            await following

        tasks = [
            background.create_task(follow_on()),
            background.create_task(report_health()),
            background.create_task(garbage.collect_when_quiet(lambda: frontend.num_in_flight < QUIET_REQUESTS)),
        ]
        if config.api_keys:
            tasks.append(background.create_task(follow(doorkeeper, config.api_keys)))
        stack.callback(lambda: [task.cancel() for task in tasks])
        garbage.settle()
        log.info("ready", grpc=config.listen, http=config.http_listen, model=files.config.name)
        on_listening()
        try:
            await asyncio.Event().wait()
        finally:
            frontend.refuse_new()
            membership_changed.set()
            await frontend.drain(config.drain_timeout_s)
