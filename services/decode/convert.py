"""Between the contract's messages and a decode worker's types."""

from __future__ import annotations

import time

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2
from services.decode.reservations import DecodeStream, Writer
from services.decode.tickets import Ticket, WriterId
from services.runtime.place import PLACE_LABELS
from services.runtime.process import ProcessIdentity
from services.runtime.units import to_us
from services.worker.convert import to_pull_stats
from services.worker.worker import Worker


def to_writer(message: worker_pb2.Writer) -> Writer:
    return Writer(
        WriterId(message.worker_id, message.incarnation),
        message.control_address,
        ProcessIdentity.from_proto(message.process),
    )


def to_ticket_proto(ticket: Ticket, stream: DecodeStream, worker: Worker) -> worker_pb2.Ticket:
    identity = worker.identity
    return worker_pb2.Ticket(
        transfer_id=ticket.transfer_id,
        request_id=stream.request_id,
        epoch=ticket.epoch,
        owner_id=identity.worker_id,
        owner_incarnation=identity.incarnation,
        owner_control_address=identity.control_address,
        writer_id=ticket.writer.worker_id,
        writer_incarnation=ticket.writer.incarnation,
        region=worker.region.descriptor,
        layout=worker.layout_proto(),
        first_block_index=ticket.first_block_index,
        blocks=ticket.blocks,
        num_prompt_tokens=stream.sequence.num_prompt,
        expires_in_ms=max(1, int((ticket.expires_s - time.monotonic()) * 1000)),
        verify=ticket.verify,
        further_regions=[region.descriptor for region in worker.further_regions],
        owner_labels={name: value for name, value in worker.labels.items() if name in PLACE_LABELS},
    )


def to_finished_proto(stream: DecodeStream, reason: common_pb2.FinishReason.ValueType) -> worker_pb2.DecodeFinished:
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
        pulled_s = stream.pulled.elapsed_s if stream.pulled else 0.0
        finished.prefill.MergeFrom(
            common_pb2.PrefillStats(
                queue_us=0 if stream.started_s is None else to_us(stream.started_s - stream.opened_s - pulled_s),
                compute_us=to_us(stream.prefill_s),
                num_prompt_tokens=sequence.num_prompt,
                num_cached_tokens=sequence.num_cached,
                num_chunks=sequence.num_chunks,
                pull=to_pull_stats(stream.pulled) if stream.pulled else None,
            )
        )
    return finished
