"""kvferry.api.worker.v1.DecodeService: translation between messages, ``Session`` and ``Reservations``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.decode.reservations import Reservations
from services.decode.session import Session
from services.decode.tickets import WriterId, Written
from services.runtime.units import to_us
from services.worker.worker import Worker

Context = grpc.aio.ServicerContext[Any, Any]


class DecodeServicer(worker_pb2_grpc.DecodeServiceServicer):
    def __init__(self, worker: Worker, reservations: Reservations) -> None:
        self._worker = worker
        self._reservations = reservations
        self._sessions: set[Session] = set()
        worker.end_streams = self._end_sessions

    async def Decode(
        self, requests: AsyncIterator[worker_pb2.DecodeRequest], context: Context
    ) -> AsyncIterator[worker_pb2.DecodeResponse]:
        session = Session(self._worker, self._reservations)
        self._sessions.add(session)
        following = asyncio.create_task(session.follow(requests))
        try:
            async with aclosing(session.responses()) as responses:
                async for response in responses:
                    yield response
        finally:
            self._sessions.discard(session)
            following.cancel()
            session.close()
            await asyncio.gather(following, return_exceptions=True)

    async def CommitTransfer(
        self, request: worker_pb2.CommitTransferRequest, context: Context
    ) -> worker_pb2.CommitTransferResponse:
        self._worker.require_incarnation(request.owner_incarnation)
        verify_s = await self._reservations.commit(
            request.transfer_id,
            request.epoch,
            WriterId(request.writer_id, request.writer_incarnation),
            Written(request.num_blocks, request.num_tokens, request.num_bytes, tuple(request.block_digests)),
            request.first_token,
        )
        return worker_pb2.CommitTransferResponse(verify_us=to_us(verify_s))

    async def AbortTransfer(
        self, request: worker_pb2.AbortTransferRequest, context: Context
    ) -> worker_pb2.AbortTransferResponse:
        self._worker.require_incarnation(request.owner_incarnation)
        self._reservations.abort_by_writer(
            request.transfer_id,
            request.epoch,
            WriterId(request.writer_id, request.writer_incarnation),
            request.reason,
        )
        return worker_pb2.AbortTransferResponse()

    def _end_sessions(self) -> None:
        for session in self._sessions:
            session.end()
