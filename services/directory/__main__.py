"""``python -m services.directory``: the cache directory as a process."""

from __future__ import annotations

import asyncio
import sys

import prometheus_client
import structlog

from kvferry.api.directory.v1 import directory_pb2, directory_pb2_grpc
from services.directory.config import MEMORY, DirectoryConfig
from services.directory.library import IndexUnavailable, load
from services.directory.memory_store import MemoryStore
from services.directory.metrics import DirectoryCollector
from services.directory.servicer import DirectoryServicer
from services.directory.store import Store, StoreAwayError
from services.runtime import config, logs, tracing
from services.runtime.metrics import serve_metrics
from services.runtime.probes import serve_probes
from services.runtime.server import (
    add_standard_services,
    bind,
    create_inner_server,
    run_until_stopped,
    running,
    set_ready,
    split_address,
)
from services.runtime.startup import StartupError

_PROG = "python -m services.directory"
_SERVICE_NAME = directory_pb2.DESCRIPTOR.services_by_name["DirectoryService"].full_name
_STOP_GRACE_S = 1.0

_log = structlog.stdlib.get_logger("services.directory")


async def serve(settings: DirectoryConfig) -> None:
    """Serves until cancelled.  Raises StartupError."""
    try:
        load()
    except IndexUnavailable as error:
        raise StartupError(str(error)) from error
    store = open_store(settings)
    server, credentials = create_inner_server(settings.certificates(settings.listen))
    directory_pb2_grpc.add_DirectoryServiceServicer_to_server(DirectoryServicer(store), server)
    names = (_SERVICE_NAME,)
    health = await add_standard_services(server, names)
    await set_ready(health, names, False)
    port = bind(server, settings.listen, credentials=credentials)
    host = split_address(settings.listen)[0]
    prometheus_client.REGISTRY.register(DirectoryCollector(store))
    # The store is left before the server, so its watches have ended when the server waits for its calls.
    with serve_metrics(settings.metrics_port, host=host):
        try:
            async with (
                serve_probes(health, settings.listen, settings.health_port),
                running(server, grace_s=_STOP_GRACE_S),
                store,
            ):
                _log.info("listening", address=f"{host}:{port}", metrics_port=settings.metrics_port)
                async for is_available in store.availability():
                    await set_ready(health, names, is_available)
                await asyncio.Event().wait()
        except StoreAwayError as error:
            raise StartupError(str(error)) from error


def open_store(settings: DirectoryConfig) -> Store:
    """Raises StartupError."""
    bounds = {"max_events": settings.history_events, "max_index_entries": settings.max_index_entries}
    if settings.store == MEMORY:
        return MemoryStore(**bounds)
    try:
        from services.directory.redis_link import RedisLink
        from services.directory.redis_store import RedisStore
    except ImportError as error:
        raise StartupError(f"--store with a URL needs redis ({error}); pip install 'kvferry[redis]'") from error
    try:
        password = None
        if settings.store_password_file is not None:
            password = settings.store_password_file.read_text(encoding="utf-8").partition("\n")[0]
        link = RedisLink(settings.store, password=password, max_events=settings.history_events)
    except OSError as error:
        raise StartupError(
            f"cannot read the --store-password-file {settings.store_password_file}: {error.strerror}"
        ) from error
    except ValueError as error:
        # Without its text, which may repeat a password.
        raise StartupError("--store is not a URL that can be understood; write redis://host:port/db") from error
    return RedisStore(link, **bounds)


def main() -> int:
    settings = config.load(DirectoryConfig, sys.argv[1:], _PROG)
    logs.configure("directory", level=settings.log_level.value)
    tracing.configure("directory")
    return run_until_stopped(serve(settings), prog=_PROG)


if __name__ == "__main__":
    sys.exit(main())
