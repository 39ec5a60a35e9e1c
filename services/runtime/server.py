"""A service's gRPC server, from its socket to its last signal."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from services.runtime.access import RoleInterceptor
from services.runtime.interceptor import RequestInterceptor
from services.runtime.startup import StartupError, cannot_listen
from services.runtime.tls import Certificates

# A health service that is SERVING while the event loop runs: who is not ready may still be working.
LIVE = "live"
MAX_MESSAGE_NBYTES = 16 * 1024 * 1024
# Of a call's metadata, where each entry counts as 32 bytes beside its own, so that there are 256 at most.
MAX_METADATA_NBYTES = 8 * 1024

_log = structlog.stdlib.get_logger(__name__)

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_NBYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_NBYTES),
    # Both bounds: between them gRPC would refuse at random.
    ("grpc.max_metadata_size", MAX_METADATA_NBYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_NBYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Our channels ping every 5 s, also while idle; the default would end their connections for pinging too often.
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default two that listen on one port by mistake would share its calls without noticing.
    ("grpc.so_reuseport", 0),
)


def create_server(
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    max_concurrent_rpcs: int | None = None,
) -> grpc.aio.Server:
    """A server that maps errors as RequestInterceptor says; ``interceptors`` run inside of it.  Add servicers, then
    ``add_standard_services``, then ``bind``, then enter ``running``.  Calls beyond ``max_concurrent_rpcs`` are refused
    with RESOURCE_EXHAUSTED."""
    return grpc.aio.server(
        interceptors=(RequestInterceptor(), *interceptors),
        options=_OPTIONS,
        maximum_concurrent_rpcs=max_concurrent_rpcs,
    )


def create_inner_server(certificates: Certificates | None) -> tuple[grpc.aio.Server, grpc.ServerCredentials | None]:
    """A server for other services alone, and what to ``bind`` it with: with ``certificates`` callers must show one of their
    own, and may what RoleInterceptor lets their role do."""
    if certificates is None:
        return create_server(), None
    return create_server(interceptors=[RoleInterceptor()]), certificates.server_credentials(require_client=True)


class Server(Protocol):
    """As much of grpc.aio.Server as is asked of others too."""

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Any, /) -> None: ...

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any, /) -> None: ...

    async def start(self) -> None: ...

    async def stop(self, grace: float | None, /) -> None: ...


async def add_standard_services(server: Server, service_names: Iterable[str]) -> health.aio.HealthServicer:
    """Adds grpc.health.v1 (SERVING for the server, for each of the full ``service_names``, and for LIVE) and reflection.
    Await ``set_ready`` on the result to change all but LIVE."""
    names = tuple(service_names)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for name in ("", *names, LIVE):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    described = reflection.aio.ReflectionServicer((*names, health.SERVICE_NAME, reflection.SERVICE_NAME))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(described, server)
    return servicer


async def set_ready(servicer: health.aio.HealthServicer, service_names: Iterable[str], ready: bool) -> None:
    """What ``servicer`` says of the server and of the full ``service_names``."""
    statuses = health_pb2.HealthCheckResponse
    for name in ("", *service_names):
        await servicer.set(name, statuses.SERVING if ready else statuses.NOT_SERVING)


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[v6]:port".  Raises StartupError for anything else."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise StartupError(f"{address!r} is not an address; write host:port, for example 127.0.0.1:8000")
    return host, int(port)


def bind(
    server: grpc.aio.Server,
    address: str,
    *,
    credentials: grpc.ServerCredentials | None = None,
    flag: str = "--listen",
    share_port: bool = False,
) -> int:
    """Opens ``address`` ("host:port", port 0 picks one), in the clear without ``credentials``, and returns the port.
    Raises StartupError, naming ``flag`` as the remedy, when that cannot be done.  ``share_port`` as of ``reserve``."""
    reserve(address, flag, share_port=share_port).close()
    try:
        return (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {address}; choose another with {flag}") from error


def reserve(address: str, flag: str, *, share_port: bool = False) -> socket.socket:
    """A socket that has ``address`` and does not listen: nobody else gets it, but with ``share_port`` processes of this
    user that share it too.  Raises StartupError, which says why it cannot be had; gRPC would not."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, sockaddr = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # By name: of a connection whose socket does not say that it is TCP, asyncio would let small writes wait for the
        # acknowledgement of those before (TCP_NODELAY).
        reserved = socket.socket(family, kind, protocol)
        try:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if share_port:
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reserved.bind(sockaddr)
        except OSError:
            reserved.close()
            raise
        return reserved
    except OSError as error:
        raise cannot_listen(error, address, flag) from error


@asynccontextmanager
async def running(server: Server, *, grace_s: float) -> AsyncIterator[None]:
    """Serves while entered.  On leaving no new call is accepted, and calls in progress have ``grace_s`` to end before
    they are cancelled."""
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace_s)


def run_until_stopped(main: Coroutine[Any, Any, None], *, prog: str) -> int:
    """Runs ``main`` and returns the process's exit status.

    The first SIGINT or SIGTERM cancels ``main``, whose ``async with`` blocks then shut down in their own bounded time
    (status 0); the second ends the process at once (status 128 + signal).  A StartupError is shown as one sentence
    (status 1).  Other exceptions propagate.
    """
    with asyncio.Runner() as runner:
        return runner.run(_until_stopped(main, prog))


async def _until_stopped(main: Coroutine[Any, Any, None], prog: str) -> int:
    task = asyncio.ensure_future(main)
    stopping = False

    def stop(number: int) -> None:
        nonlocal stopping
        if stopping:
            os._exit(128 + number)
        stopping = True
        _log.info("stopping", signal=signal.Signals(number).name)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        with suppress(asyncio.CancelledError):
            await task
        return 0
    except StartupError as error:
        print(f"{prog}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
