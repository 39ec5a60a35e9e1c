"""What makes a worker a prefill worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace

import grpc

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import Error
from services.prefill.conversion import Converter
from services.prefill.ferries import Ferries
from services.prefill.servicer import PrefillServicer
from services.runtime.channels import Channels
from services.runtime.startup import StartupError
from services.worker.config import WorkerConfig, parse_nbytes
from services.worker.digester import Digester
from services.worker.node import Role
from services.worker.puller import Puller
from services.worker.servicer import StopTransfer
from services.worker.worker import Worker
from transport import Region, TransportError


@asynccontextmanager
async def _serve(
    server: grpc.aio.Server, worker: Worker, channels: Channels, puller: Puller, config: WorkerConfig
) -> AsyncIterator[StopTransfer]:
    scratch = _scratch_region(worker, config.convert_memory)
    with closing(Converter(worker.regions, scratch)) as converter, Digester(worker) as digester:
        async with Ferries(worker, channels, puller, converter, digester) as ferries:
            worker_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(ferries), server)
            yield ferries.stop_transfer


def _scratch_region(worker: Worker, size: str) -> Region:
    """Raises StartupError."""
    least = replace(worker.layout, dtype="float32").token_nbytes  # no type is wider
    try:
        nbytes = parse_nbytes(size)
        if nbytes < least:
            raise StartupError(f"--convert-memory {size} holds not one token; give at least {least} bytes")
        return worker.transport.allocate(nbytes)
    except (Error, TransportError) as e:
        raise StartupError(f"--convert-memory: {e}") from e


PREFILL = Role(
    common_pb2.WORKER_ROLE_PREFILL, worker_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name, _serve
)
