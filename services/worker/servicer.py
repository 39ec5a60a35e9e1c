"""kvferry.api.worker.v1.WorkerService, the same for both roles."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import ConflictError
from services.worker.worker import Worker

Context = grpc.aio.ServicerContext[Any, Any]
StopTransfer = Callable[[worker_pb2.StopTransferRequest], Awaitable[None]]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, worker: Worker, stop_transfer: StopTransfer) -> None:
        """``stop_transfer`` returns once nothing is written under the ticket that is asked about."""
        self._worker = worker
        self._stop_transfer = stop_transfer

    async def StopTransfer(
        self, request: worker_pb2.StopTransferRequest, context: Context
    ) -> worker_pb2.StopTransferResponse:
        identity = self._worker.identity
        if request.writer_id != identity.worker_id:
            raise ConflictError(f"this is {identity.worker_id}, not {request.writer_id}", reason="OTHER_WORKER")
        # Another incarnation was asked for: that process has ended, this one has taken its place.
        if request.writer_incarnation == identity.incarnation:
            await self._stop_transfer(request)
        return worker_pb2.StopTransferResponse(incarnation=identity.incarnation)

    async def Drain(self, request: worker_pb2.DrainRequest, context: Context) -> worker_pb2.DrainResponse:
        await drain(self._worker)
        return worker_pb2.DrainResponse()

    async def GetStats(self, request: worker_pb2.GetStatsRequest, context: Context) -> worker_pb2.GetStatsResponse:
        worker = self._worker
        traffic, work = worker.traffic, worker.engine.work
        return worker_pb2.GetStatsResponse(
            state=directory_pb2.WorkerState(info=worker.info(), load=worker.load()),
            num_blocks_written=traffic.blocks_written,
            num_bytes_written=traffic.bytes_written,
            num_blocks_received=traffic.blocks_received,
            num_bytes_received=traffic.bytes_received,
            num_prefill_tokens=work.prefill_tokens,
            num_decode_tokens=work.decode_tokens,
            num_cached_tokens=work.cached_tokens,
            integrity_ok=worker.integrity_ok(),
        )


async def drain(worker: Worker) -> None:
    """Takes no new work; returns when what there is has ended.  The caller sets the deadline."""
    worker.draining = True
    while not worker.is_idle():
        worker.router.changed.clear()
        await worker.router.changed.wait()
