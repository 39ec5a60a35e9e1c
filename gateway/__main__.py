"""The gateway process: python -m gateway"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from math import inf

import prometheus_client
import structlog

from gateway.admission import Objectives
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
from gateway.metrics import ViewCollector
from gateway.servicer import ClusterServicer, InferenceServicer
from gateway.tenants import KeyFileError
from gateway.view import Change, ClusterView, watch
from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc
from kvferry.errors import Error
from services.directory.library import IndexUnavailable
from services.engine.model_files import open_model
from services.runtime import logs, tracing
from services.runtime.channels import Channels
from services.runtime.config import load
from services.runtime.probes import serve_probes
from services.runtime.server import (
    add_standard_services,
    bind,
    create_server,
    run_until_stopped,
    running,
    set_ready,
    split_address,
)
from services.runtime.startup import StartupError

log = structlog.get_logger(__name__)

SERVER_GRACE_S = 2.0


async def run_gateway(config: GatewayConfig) -> None:
    """Serves until cancelled; then lets running requests finish, within ``config.drain_timeout_s``.  Raises
    StartupError."""
    async with AsyncExitStack() as stack:
        certificates, shown = config.both_certificates()
        server = create_server(write_timeout_s=config.write_timeout_s)
        # Clients show keys, not certificates.
        credentials = shown.server_credentials(require_client=False) if shown else None
        bind(server, config.listen, credentials=credentials)
        try:
            files = await asyncio.to_thread(open_model, config.model)
            view = ClusterView(max_index_entries=config.max_index_entries)
            doorkeeper = Doorkeeper(read_keys(config.api_keys) if config.api_keys else None)
        except (Error, IndexUnavailable, KeyFileError) as e:
            raise StartupError(str(e)) from e
        channels = await stack.enter_async_context(Channels(certificates))
        prometheus_client.REGISTRY.register(ViewCollector(view))
        links = await stack.enter_async_context(DecodeLinks(channels))
        dispatcher = Dispatcher(
            view, channels, links, model_revision=files.config.revision, routing=config.routing,
            min_ship_tokens=config.min_ship_tokens, max_attempts=config.max_attempts,
            stall_timeout_s=config.stall_timeout_s, eos_token_ids=files.config.eos_token_ids,
            retry_ratio=config.retry_ratio,
            objectives=Objectives(config.max_queue_s, config.slo_ttft_s or inf, config.slo_itl_s or inf),
        )  # fmt: skip
        frontend = Frontend(
            files, view, dispatcher, max_requests=config.max_requests, max_request_s=config.max_request_s
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(frontend, doorkeeper), server)
        inference_pb2_grpc.add_ClusterServiceServicer_to_server(
            ClusterServicer(frontend, doorkeeper, view, dispatcher.decisions), server
        )
        names = [s.full_name for s in inference_pb2.DESCRIPTOR.services_by_name.values()]
        health = await add_standard_services(server, names)

        membership_changed = asyncio.Event()

        async def report_health() -> None:
            """SERVING for as long as a request would find workers."""
            ready = None
            while True:
                if ready is not frontend.ready:
                    ready = frontend.ready
                    await set_ready(health, names, ready)
                membership_changed.clear()
                await membership_changed.wait()

        await set_ready(health, names, False)
        vocabulary = Vocabulary(text=frontend.token_text, bytes=files.tokenizer.token_bytes)
        limits = HttpLimits(max_body_nbytes=config.max_body_nbytes, max_timeout_s=config.max_request_s,
                            write_timeout_s=config.write_timeout_s)  # fmt: skip
        dashboard = Dashboard(
            view, frontend.recent, model=files.config.name,
            in_flight=lambda: frontend.num_in_flight, total=lambda: frontend.num_requests_total,
        )  # fmt: skip
        app = create_app(frontend, vocabulary=vocabulary, limits=limits, doorkeeper=doorkeeper, dashboard=dashboard)
        http = HttpServer(app, shown)
        await stack.enter_async_context(serve_probes(health, config.listen, config.health_port))
        await stack.enter_async_context(running(server, grace_s=SERVER_GRACE_S))
        await http.start(*split_address(config.http_listen), flag="--http-listen")
        stack.push_async_callback(http.stop, SERVER_GRACE_S)
        # Entered last: what goes wrong before is a StartupError and not a group of them.
        background = await stack.enter_async_context(asyncio.TaskGroup())

        def on_change(changes: list[Change]) -> None:
            membership_changed.set()
            dispatcher.members_changed(changes)

        following = watch(view, config.directory, on_change=on_change, certificates=certificates)
        tasks = [background.create_task(following), background.create_task(report_health())]
        if config.api_keys:
            tasks.append(background.create_task(follow(doorkeeper, config.api_keys)))
        stack.callback(lambda: [task.cancel() for task in tasks])
        log.info("ready", grpc=config.listen, http=config.http_listen, model=files.config.name)
        try:
            await asyncio.Event().wait()
        finally:
            frontend.refuse_new()
            membership_changed.set()
            await frontend.drain(config.drain_timeout_s)


def main() -> int:
    prog = "python -m gateway"
    config = load(GatewayConfig, sys.argv[1:], prog)
    logs.configure("gateway", level=config.log_level.value)
    tracing.configure("gateway")
    return run_until_stopped(run_gateway(config), prog=prog)


if __name__ == "__main__":
    sys.exit(main())
