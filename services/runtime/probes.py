"""Health for who has no certificate: a kubelet's probes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.runtime.server import bind, running, split_address

_log = structlog.stdlib.get_logger(__name__)

# More probes at once are refused: nobody needs them.
_MAX_CALLS = 16
_STOP_GRACE_S = 0.5


@asynccontextmanager
async def serve_probes(
    servicer: health.aio.HealthServicer, listen: str, port: int, *, share_port: bool = False
) -> AsyncIterator[None]:
    """Answers grpc.health.v1's Check, in the clear and nothing else, on ``port`` of the host of ``listen`` while entered;
    port 0 is off.  "" is ready, which a service that drains or waits for others is not; LIVE is for restarts.
    ``share_port`` as of ``reserve``.  Raises StartupError when the port cannot be had."""
    if port == 0:
        yield
        return
    host, _ = split_address(listen)
    server = grpc.aio.server(options=(("grpc.so_reuseport", int(share_port)),), maximum_concurrent_rpcs=_MAX_CALLS)
    health_pb2_grpc.add_HealthServicer_to_server(_Check(servicer), server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    bind(server, address, flag="--health-port", share_port=share_port)
    async with running(server, grace_s=_STOP_GRACE_S):
        _log.info("probes", host=host, port=port)
        yield


class _Check(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # comes without types
    """Watch, which holds a call for as long as its client likes, stays unimplemented."""

    def __init__(self, servicer: health.aio.HealthServicer) -> None:
        self._servicer = servicer

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        return await self._servicer.Check(request, context)
