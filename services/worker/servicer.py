"""kvferry.api.worker.v1.WorkerService, the same for both roles."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import ConflictError, UnavailableError
from services.runtime.process import ProcessIdentity, has_ended
from services.worker.convert import to_hashes
from services.worker.holdings import Holdings
from services.worker.pins import ReaderId
from services.worker.role_change import change_role
from services.worker.worker import Worker

Context = grpc.aio.ServicerContext[Any, Any]
StopTransfer = Callable[[worker_pb2.StopTransferRequest], Awaitable[None]]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, worker: Worker, stop_transfer: StopTransfer, holdings: Holdings) -> None:
        """``stop_transfer`` returns once nothing is written under the ticket that is asked about."""
        self._worker = worker
        self._stop_transfer = stop_transfer
        self._holdings = holdings

    async def StopTransfer(
        self, request: worker_pb2.StopTransferRequest, context: Context
    ) -> worker_pb2.StopTransferResponse:
        identity = self._worker.identity
        if request.writer_id != identity.worker_id:
            raise ConflictError(f"this is {identity.worker_id}, not {request.writer_id}", reason="OTHER_WORKER")
        if request.writer_incarnation == identity.incarnation:
            await self._stop_transfer(request)
        # Another incarnation was asked for: that process has ended, this one has taken its place; unless it has not yet.
        elif has_ended(ProcessIdentity.from_proto(request.writer_process)) is False:
            raise UnavailableError(f"the process before this one, of {identity.worker_id}, still runs")
        return worker_pb2.StopTransferResponse(incarnation=identity.incarnation)

    async def PinBlocks(self, request: worker_pb2.PinBlocksRequest, context: Context) -> worker_pb2.PinBlocksResponse:
        worker = self._worker
        worker.require_incarnation(request.owner_incarnation)
        pin = self._holdings.pin(
            to_hashes(request.hashes),
            ReaderId(request.reader_id, request.reader_incarnation),
            request.lifetime_ms / 1000,
        )
        response = worker_pb2.PinBlocksResponse(owner_incarnation=worker.identity.incarnation)
        if pin is not None:
            response.MergeFrom(
                worker_pb2.PinBlocksResponse(
                    pin_id=pin.id,
                    blocks=pin.blocks,
                    region=worker.region.descriptor,
                    layout=worker.layout_proto(),
                    expires_in_ms=max(0, int((pin.expires_s - time.monotonic()) * 1000)),
                )
            )
        return response

    async def ReleasePin(
        self, request: worker_pb2.ReleasePinRequest, context: Context
    ) -> worker_pb2.ReleasePinResponse:
        self._worker.require_incarnation(request.owner_incarnation)
        reader = ReaderId(request.reader_id, request.reader_incarnation)
        return worker_pb2.ReleasePinResponse(held=self._holdings.release(request.pin_id, reader))

    async def Drain(self, request: worker_pb2.DrainRequest, context: Context) -> worker_pb2.DrainResponse:
        await drain(self._worker)
        return worker_pb2.DrainResponse()

    async def ChangeRole(
        self, request: worker_pb2.ChangeRoleRequest, context: Context
    ) -> worker_pb2.ChangeRoleResponse:
        await change_role(self._worker, request.role)
        return worker_pb2.ChangeRoleResponse()

    async def GetStats(self, request: worker_pb2.GetStatsRequest, context: Context) -> worker_pb2.GetStatsResponse:
        worker = self._worker
        traffic, work, host = worker.traffic, worker.engine.work, worker.engine.host_totals
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
            num_host_blocks_saved=host.saved,
            num_host_blocks_loaded=host.loaded,
            num_host_blocks_lost=host.lost,
            num_host_copies_failed=host.failed_copies,
            num_blocks_pulled=traffic.blocks_pulled,
            num_bytes_pulled=traffic.bytes_pulled,
        )


async def drain(worker: Worker) -> None:
    """Takes no new work, for good; returns when what there is has ended, pins included.  The caller sets the deadline."""
    worker.draining = True
    worker.report_load()
    await worker.tell_draining()
    await worker.idle()
