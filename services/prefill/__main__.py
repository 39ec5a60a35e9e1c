"""A prefill worker: computes prompts and writes their KV blocks into decode workers' pools."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.prefill.ferries import Ferries
from services.prefill.servicer import PrefillServicer
from services.runtime.channels import Channels
from services.worker.config import WorkerConfig
from services.worker.digester import Digester
from services.worker.node import Role
from services.worker.servicer import StopTransfer
from services.worker.start import start
from services.worker.worker import Worker


@asynccontextmanager
async def _serve(
    server: grpc.aio.Server, worker: Worker, channels: Channels, config: WorkerConfig
) -> AsyncIterator[StopTransfer]:
    with Digester(worker) as digester:
        async with Ferries(worker, channels, digester) as ferries:
            worker_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(ferries), server)
            yield ferries.stop_transfer


ROLE = Role(common_pb2.WORKER_ROLE_PREFILL, worker_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name, _serve)

if __name__ == "__main__":
    sys.exit(start(ROLE, "prefill"))
