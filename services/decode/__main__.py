"""A decode worker: streams tokens from KV blocks that prefill workers write into its pool."""

from __future__ import annotations

import sys
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
from services.worker.servicer import StopTransfer
from services.worker.share import Share
from services.worker.start import start
from services.worker.worker import Worker


@asynccontextmanager
async def _serve(
    server: grpc.aio.Server, worker: Worker, channels: Channels, puller: Puller, config: WorkerConfig
) -> AsyncIterator[StopTransfer]:
    terms = Terms(config.ticket_lifetime_s, Share.parse(config.verify_transfers), config.pair_quarantine_s)
    with Digester(worker) as digester:
        async with Reservations(worker, channels, puller, digester, terms) as reservations:
            worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(worker, reservations), server)
            yield _writes_nowhere


async def _writes_nowhere(request: worker_pb2.StopTransferRequest) -> None:
    """A decode worker never holds another's ticket."""


ROLE = Role(common_pb2.WORKER_ROLE_DECODE, worker_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name, _serve)

if __name__ == "__main__":
    sys.exit(start(ROLE, "decode"))
