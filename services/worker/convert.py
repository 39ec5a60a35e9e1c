"""Between the contract's messages and the engine's types; every worker-side conversion is here."""

from __future__ import annotations

from dataclasses import replace

from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import ConflictError, InvalidRequestError
from services.engine.blocks import Counts
from services.engine.hashing import HASH_NBYTES
from services.engine.layout import KvLayout
from services.engine.lookup import Drafter
from services.engine.phase_book import COMPUTED, Phase, PhaseBook
from services.engine.sampling_params import Drawn, Sampling
from services.engine.sequence import FinishReason, Sequence, SequenceId
from services.engine.step_sums import StepSums
from services.runtime.place import Distance
from services.runtime.units import to_us
from services.worker.pull_terms import PullReport, Source
from transport.reach import Reach, Way

_FINISH = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}

_PHASES = {
    Phase.PREFILL: directory_pb2.PHASE_PREFILL,
    Phase.DECODE: directory_pb2.PHASE_DECODE,
    Phase.TRANSFER: directory_pb2.PHASE_TRANSFER,
    Phase.IDLE: directory_pb2.PHASE_IDLE,
}


_PATH_KINDS = {
    Way.SHARED_MEMORY: directory_pb2.PATH_KIND_SHARED_MEMORY,
    Way.TCP: directory_pb2.PATH_KIND_TCP,
    Way.RDMA: directory_pb2.PATH_KIND_RDMA,
}


_DISTANCES = {
    Distance.HOST: directory_pb2.DISTANCE_HOST,
    Distance.RACK: directory_pb2.DISTANCE_RACK,
    Distance.ZONE: directory_pb2.DISTANCE_ZONE,
    Distance.FARTHER: directory_pb2.DISTANCE_FARTHER,
}


def to_sequence(
    id_: SequenceId,
    prompt: list[int],
    params: common_pb2.SamplingParams,
    *,
    chain_root: bytes,
    eos_ids: frozenset[int],
    vocab_size: int,
    context_length: int,
    prefill_only: bool,
    speculate: bool,
) -> Sequence:
    """``speculate`` holds where the request does not say.  Raises InvalidRequestError for what a gateway should have
    refused."""
    if not prompt:
        raise InvalidRequestError("the prompt has no tokens")
    if len(prompt) >= context_length:
        raise InvalidRequestError(f"the prompt has {len(prompt)} tokens, the context holds {context_length}")
    if max(prompt) >= vocab_size:
        raise InvalidRequestError(f"token id {max(prompt)} is outside the vocabulary of {vocab_size}")
    for name in ("max_tokens", "temperature", "top_p", "top_k", "seed"):
        if not params.HasField(name):
            raise InvalidRequestError(f"sampling.{name} is not set; a gateway fills it in")
    if params.max_tokens < 1:
        raise InvalidRequestError(f"sampling.max_tokens is {params.max_tokens}; it must be at least 1")
    if params.HasField("speculate"):
        speculate = params.speculate
    stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
    return Sequence(
        id=id_,
        tokens=prompt,
        sampling=Sampling(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=params.seed,
            num_logprobs=params.num_logprobs if params.HasField("num_logprobs") else None,
        ),
        max_tokens=1 if prefill_only else params.max_tokens,
        stop_ids=stop_ids,
        chain=[chain_root],
        prefill_only=prefill_only,
        drafter=Drafter() if speculate and not prefill_only else None,
    )


def to_hashes(packed: bytes) -> list[bytes]:
    """Raises InvalidRequestError."""
    if len(packed) % HASH_NBYTES:
        raise InvalidRequestError(
            f"hashes holds {len(packed)} bytes, which are not whole hashes of {HASH_NBYTES} bytes"
        )
    return [packed[i : i + HASH_NBYTES] for i in range(0, len(packed), HASH_NBYTES)]


def to_token(index: int, drawn: Drawn) -> common_pb2.Token:
    return common_pb2.Token(
        index=index,
        id=drawn.token_id,
        logprob=drawn.logprob,
        top_logprobs=[common_pb2.TokenLogprob(token_id=t, logprob=p) for t, p in drawn.top],
    )


def to_drawn(token: common_pb2.Token) -> Drawn:
    return Drawn(
        token.id,
        token.logprob if token.HasField("logprob") else None,
        tuple((t.token_id, t.logprob) for t in token.top_logprobs),
    )


def to_layout_proto(layout: KvLayout) -> common_pb2.Layout:
    return common_pb2.Layout(
        fingerprint=layout.fingerprint,
        block_size_tokens=layout.block_size,
        block_nbytes=layout.block_nbytes,
        dtype=layout.dtype,
        content_fingerprint=layout.content_fingerprint,
        num_ranks=layout.tp,
    )


def to_path(reach: Reach) -> directory_pb2.TransportPath:
    return directory_pb2.TransportPath(kind=_PATH_KINDS[reach.way], scope=reach.scope)


def to_transfer_rate(distance: Distance, bytes_per_s: float, round_trip_s: float) -> directory_pb2.TransferRate:
    return directory_pb2.TransferRate(distance=_DISTANCES[distance], bytes_per_s=bytes_per_s, round_trip_s=round_trip_s)


def to_peer_layout(message: common_pb2.Layout, ours: KvLayout) -> KvLayout:
    """The layout of a pool that holds what ours holds, maybe in blocks of another size or type or cut in another way.
    Raises ConflictError, which names both, when it holds anything else."""
    try:
        theirs = replace(ours, dtype=message.dtype, block_size=message.block_size_tokens, tp=max(1, message.num_ranks))
    except ValueError:  # a type that we do not know, or more ranks than heads
        theirs = None
    if theirs is None or theirs.fingerprint != message.fingerprint:
        raise ConflictError(
            f"the pools differ: ours is {to_layout_proto(ours)}, the owner's {message}".replace("\n", " "),
            reason="LAYOUTS_DIFFER",
        )
    return theirs


def to_source(message: worker_pb2.PullSource) -> Source:
    return Source(
        message.worker_id,
        message.incarnation,
        message.control_address,
        message.num_blocks,
        message.within_ms / 1000,
    )


def to_pull_stats(report: PullReport) -> common_pb2.PullStats:
    return common_pb2.PullStats(
        holder=report.holder,
        outcome=report.outcome.value,
        num_blocks=report.num_blocks,
        num_bytes=report.num_bytes,
        elapsed_us=to_us(report.elapsed_s),
        busy_us=to_us(report.busy_s),
    )


def to_finish_reason(reason: FinishReason) -> common_pb2.FinishReason.ValueType:
    return _FINISH[reason]


def to_block_counts(counts: Counts) -> common_pb2.BlockCounts:
    return common_pb2.BlockCounts(
        total=counts.total,
        free=counts.free,
        active=counts.active,
        cached=counts.cached,
        lent=counts.lent,
        quarantined=counts.quarantined,
    )


def to_phase_loads(book: PhaseBook) -> list[directory_pb2.PhaseLoad]:
    loads = []
    for phase, name in _PHASES.items():
        load = directory_pb2.PhaseLoad(phase=name, share=book.shares[phase], seconds=book.seconds[phase])
        if phase in COMPUTED:
            demand, use = book.demands[phase], book.use(phase)
            load.flops, load.bytes = demand.flops, demand.nbytes
            load.intensity, load.mfu, load.mbu = use.intensity, use.mfu, use.mbu
        loads.append(load)
    return loads


def to_step_sums(sums: StepSums) -> directory_pb2.StepSums:
    return directory_pb2.StepSums(
        seconds=sums.seconds, shares=sums.shares, ratios=sums.ratios, products=sums.products, scatter=sums.scatter,
        squares=sums.squares,
    )  # fmt: skip
