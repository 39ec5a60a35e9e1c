"""From what a worker reported to what routing knows of it."""

from __future__ import annotations

from dataclasses import replace

from gateway.candidates import Abilities, Candidate, Rates, Role, TransferRate, WorkerKey
from gateway.costs import HORIZON_TOKENS
from gateway.pending import Pending
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from services.directory.index import Prefix
from services.runtime.place import Distance, Place

ROLES = {common_pb2.WORKER_ROLE_PREFILL: Role.PREFILL, common_pb2.WORKER_ROLE_DECODE: Role.DECODE}
_DISTANCES: dict[int, Distance] = {distance.value: distance for distance in Distance}


def key_of(info: directory_pb2.WorkerInfo) -> WorkerKey:
    return WorkerKey(info.worker_id, info.incarnation)


def to_candidate(worker: directory_pb2.WorkerState, abilities: Abilities, place: Place) -> Candidate:
    """As it reported last, to a request of which it has nothing cached.  ``abilities`` and ``place``: as it registered
    them.  Raises KeyError for a role that is not one of ``ROLES``."""
    info, load = worker.info, worker.load
    block_size = info.layout.block_size_tokens
    return Candidate(
        key=key_of(info),
        role=ROLES[info.role],
        address=info.control_address,
        content_fingerprint=info.layout.content_fingerprint,
        block_size=block_size,
        block_nbytes=info.layout.block_nbytes,
        num_requests=load.num_running + load.num_waiting,
        num_queued_prefill_tokens=load.num_queued_prefill_tokens,
        num_free_blocks=max(0, _num_spare(load, block_size)),
        num_expected_answer_tokens=load.num_expected_answer_tokens or HORIZON_TOKENS,
        num_prefix_blocks=0,
        rates=Rates(
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            step_base_s=load.decode_step_base_s,
            step_per_sequence_s=load.decode_step_per_sequence_s,
            transfer_bytes_per_s=load.transfer_bytes_per_s,
            transfer_round_trip_s=load.transfer_round_trip_s,
            host_load_bytes_per_s=load.host_load_bytes_per_s,
            pull_bytes_per_s=load.pull_bytes_per_s,
            pull_overhead_s=load.pull_overhead_s,
        ),
        draining=load.draining,
        fingerprint=info.layout.fingerprint,
        host=f"{info.process.boot_id}/{info.process.pid_namespace}" if info.process.boot_id else "",
        num_pinnable_blocks=load.num_pinnable_blocks,
        abilities=abilities,
        place=place,
        transfer_rates=tuple(
            TransferRate(_DISTANCES[rate.distance], rate.bytes_per_s, rate.round_trip_s)
            for rate in load.transfer_rates
            if rate.distance in _DISTANCES
        ),
    )


def seen_now(worker: Candidate, prefix: Prefix, there: Pending) -> Candidate:
    """``worker``, as it reported, with what else is known when a request comes.  ``prefix``: of its prompt, in the worker's
    cache; ``there``: by the gateway's book."""
    is_known = (there.num_requests, there.prefill_tokens) == (worker.num_requests, worker.num_queued_prefill_tokens)
    if is_known and not prefix.num_blocks and not there.num_blocks:
        return worker
    return replace(
        worker,
        num_requests=there.num_requests,
        num_queued_prefill_tokens=there.prefill_tokens,
        num_free_blocks=max(0, worker.num_free_blocks - there.num_blocks),
        num_prefix_blocks=prefix.num_blocks,
        num_prefix_host_blocks=prefix.num_blocks - prefix.num_device_blocks,
    )


def _num_spare(load: directory_pb2.WorkerLoad, block_size: int) -> int:
    """Blocks for newcomers: what is neither resident nor lent to writers, less what those who are there may yet take."""
    growth = load.num_growth_blocks
    if not load.HasField("num_growth_blocks"):  # each is taken to be halfway through its answer
        growth = load.num_running * HORIZON_TOKENS // 2 // block_size
    return load.blocks.free + load.blocks.cached - growth
