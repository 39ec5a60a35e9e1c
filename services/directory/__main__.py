"""``python -m services.directory``: the cache directory as a process."""

from __future__ import annotations

import asyncio
import sys

import prometheus_client
import structlog

from kvferry.api.directory.v1 import directory_pb2, directory_pb2_grpc
from services.directory.config import DirectoryConfig
from services.directory.library import IndexUnavailable
from services.directory.memory_store import MemoryStore
from services.directory.metrics import DirectoryCollector
from services.directory.servicer import DirectoryServicer
from services.runtime import config, logs, tracing
from services.runtime.metrics import serve_metrics
from services.runtime.server import (
    add_standard_services,
    bind,
    create_server,
    run_until_stopped,
    running,
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
        store = MemoryStore(max_events=settings.history_events, max_index_entries=settings.max_index_entries)
    except IndexUnavailable as error:
        raise StartupError(str(error)) from error
    server = create_server()
    directory_pb2_grpc.add_DirectoryServiceServicer_to_server(DirectoryServicer(store), server)
    await add_standard_services(server, [_SERVICE_NAME])
    port = bind(server, settings.listen)
    host = split_address(settings.listen)[0]
    prometheus_client.REGISTRY.register(DirectoryCollector(store))
    # The store is left before the server, so its watches have ended when the server waits for its calls.
    with serve_metrics(settings.metrics_port, host=host):
        async with running(server, grace_s=_STOP_GRACE_S), store:
            _log.info("listening", address=f"{host}:{port}", metrics_port=settings.metrics_port)
            await asyncio.Event().wait()


def main() -> int:
    settings = config.load(DirectoryConfig, sys.argv[1:], _PROG)
    logs.configure("directory", level=settings.log_level.value)
    tracing.configure("directory")
    return run_until_stopped(serve(settings), prog=_PROG)


if __name__ == "__main__":
    sys.exit(main())
