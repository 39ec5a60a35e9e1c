"""What makes a worker a decode worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.decode.reservations import Reservations, Terms
from services.decode.servicer import DecodeServicer
from services.runtime.channels import Channels
from services.worker.config import WorkerConfig
from services.worker.digester import Digester
from services.worker.node import Role
from services.worker.puller import Puller
from services.worker.share import Share
from services.worker.worker import Worker


@asynccontextmanager
async def _serve(
    server: grpc.aio.Server, worker: Worker, channels: Channels, puller: Puller, config: WorkerConfig
) -> AsyncIterator[None]:
    terms = Terms(config.ticket_lifetime_s, Share.parse(config.verify_transfers), config.pair_quarantine_s)
    with Digester(worker) as digester:
        async with Reservations(worker, channels, puller, digester, terms) as reservations:
            worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(worker, reservations), server)
            yield None


DECODE = Role(common_pb2.WORKER_ROLE_DECODE, worker_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name, _serve)
