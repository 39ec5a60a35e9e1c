"""kvferry.api.worker.v1.DecodeService: translation between messages and ``Reservations``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.decode.reservations import DecodeStream, Finished, Reservations, Writer
from services.decode.tickets import Ticket, WriterId, Written
from services.engine.sequence import TokenDrawn
from services.runtime.process import ProcessIdentity
from services.worker.convert import to_finish_reason, to_token, to_us
from services.worker.worker import Worker

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class DecodeServicer(worker_pb2_grpc.DecodeServiceServicer):
    def __init__(self, worker: Worker, reservations: Reservations) -> None:
        self._worker = worker
        self._reservations = reservations

    async def Decode(
        self, request: worker_pb2.DecodeRequest, context: Context
    ) -> AsyncIterator[worker_pb2.DecodeResponse]:
        writer = _to_writer(request.writer) if request.HasField("writer") else None
        async with self._reservations.open(
            request.request_id, list(request.prompt_token_ids), request.sampling, request.cache_salt, writer
        ) as stream:
            if stream.ticket is not None:
                yield worker_pb2.DecodeResponse(ticket=self._ticket_proto(stream.ticket, request, stream))
            while True:
                match await stream.events.get():
                    case TokenDrawn(index=index, drawn=drawn):
                        yield worker_pb2.DecodeResponse(token=to_token(index, drawn))
                    case Finished(reason=reason):
                        finished = _finished_proto(stream, to_finish_reason(reason))
                        log.info("decoded", tokens=stream.sequence.num_output, steps=finished.decode.num_steps)
                        yield worker_pb2.DecodeResponse(finished=finished)
                        return
                    case error:
                        raise error

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

    def _ticket_proto(
        self, ticket: Ticket, request: worker_pb2.DecodeRequest, stream: DecodeStream
    ) -> worker_pb2.Ticket:
        identity = self._worker.identity
        return worker_pb2.Ticket(
            transfer_id=ticket.transfer_id,
            request_id=request.request_id,
            epoch=ticket.epoch,
            owner_id=identity.worker_id,
            owner_incarnation=identity.incarnation,
            owner_control_address=identity.control_address,
            writer_id=ticket.writer.worker_id,
            writer_incarnation=ticket.writer.incarnation,
            region=self._worker.region.descriptor,
            layout=self._worker.layout_proto(),
            first_block_index=ticket.first_block_index,
            blocks=ticket.blocks,
            num_prompt_tokens=stream.sequence.num_prompt,
            expires_in_ms=max(1, int((ticket.expires_s - time.monotonic()) * 1000)),
            verify=ticket.verify,
        )


def _to_writer(message: worker_pb2.Writer) -> Writer:
    return Writer(
        WriterId(message.worker_id, message.incarnation),
        message.control_address,
        ProcessIdentity.from_proto(message.process),
    )


def _finished_proto(stream: DecodeStream, reason: common_pb2.FinishReason.ValueType) -> worker_pb2.DecodeFinished:
    sequence = stream.sequence
    finished = worker_pb2.DecodeFinished(
        reason=reason,
        decode=common_pb2.DecodeStats(
            wait_for_kv_us=0 if stream.kv_ready_s is None else to_us(stream.kv_ready_s - stream.opened_s),
            compute_us=to_us(stream.decode_s),
            num_steps=stream.num_steps,
            num_cached_tokens=sequence.num_cached,
            prefilled_locally=stream.ticket is None,
            num_preemptions=sequence.num_preemptions,
            num_drafted_tokens=sequence.num_drafted,
            num_accepted_tokens=sequence.num_accepted,
        ),
    )
    if stream.kv_ready_s is not None and stream.first_step_s is not None:
        finished.decode.first_step_us = to_us(stream.first_step_s - stream.kv_ready_s)
    if stream.ticket is None:
        finished.prefill.MergeFrom(
            common_pb2.PrefillStats(
                queue_us=0 if stream.started_s is None else to_us(stream.started_s - stream.opened_s),
                compute_us=to_us(stream.prefill_s),
                num_prompt_tokens=sequence.num_prompt,
                num_cached_tokens=sequence.num_cached,
                num_chunks=sequence.num_chunks,
            )
        )
    return finished
