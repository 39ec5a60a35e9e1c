"""What the client takes and gives: frozen values without protobuf in them.  Durations are seconds."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias


class FinishReason(enum.Enum):
    """Why an answer ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the context's end."""
    UNKNOWN = "unknown"
    """A reason that this version of the client has no word for."""


class WorkerRole(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    UNKNOWN = "unknown"


class HealthStatus(enum.Enum):
    """What the standard health service says of a server that answers."""

    SERVING = "serving"
    NOT_SERVING = "not serving"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """``role`` is "system", "user" or "assistant"."""

    role: str
    content: str


Message: TypeAlias = ChatMessage | Mapping[str, str]
"""A message as the client accepts it: a :class:`ChatMessage`, or a mapping with ``role`` and ``content``."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm, of the distribution before temperature, top_k and top_p."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.  ``index`` is 0 for the first of the answer; ``logprob`` is None unless ``logprobs`` was
    asked for; ``top_logprobs`` is likeliest first."""

    index: int
    id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of the answer.  ``text`` may be empty while a character or a possible stop string is incomplete, so
    texts and tokens do not pair up chunk by chunk; over the whole stream both are complete and in order."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """``num_cached_tokens`` counts the prompt tokens that no worker had to compute."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class PullStats:
    """How cached blocks of the prompt were read from ``holder`` before the rest was computed.  ``outcome`` is ``pulled``,
    or why nothing was; the prompt was computed then.  ``elapsed_s`` is what the request waited for it, ``busy_s`` the part
    while bytes moved."""

    holder: str
    outcome: str
    num_blocks: int
    num_bytes: int
    elapsed_s: float
    busy_s: float


@dataclass(frozen=True, slots=True)
class PrefillStats:
    """What computing the prompt took, by the worker's own clock.  ``pull`` is None where nothing was to be read from
    another worker's cache; it comes before the queue."""

    queue_s: float
    compute_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_chunks: int
    pull: PullStats | None = None


@dataclass(frozen=True, slots=True)
class ChunkTimes:
    """One prefill chunk and the writing of its ``num_blocks`` blocks; offsets from the start of the prompt's first step,
    by the writer's clock.  Without blocks the write is None."""

    compute_begin_s: float
    compute_end_s: float
    num_blocks: int
    write_begin_s: float | None
    write_end_s: float | None


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What ferrying the prompt's KV took, measured by the writer.  ``busy_s`` sums the batches' durations;
    ``exposed_s`` is what the request waited for after the last chunk was computed, until the owner had accepted the
    commit, and ``verify_s`` the part of it that went into comparing digests, 0 when this transfer was not verified;
    ``num_hidden_bytes`` were in place before that chunk was computed; ``path`` names how the bytes went."""

    num_blocks: int
    num_bytes: int
    busy_s: float
    exposed_s: float
    path: str
    verify_s: float
    num_hidden_bytes: int
    chunks: tuple[ChunkTimes, ...]

    @property
    def bytes_per_s(self) -> float | None:
        """None when too little was written to measure."""
        return self.num_bytes / self.busy_s if self.busy_s > 0 else None


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """``wait_for_kv_s`` runs from the ticket to the writer's commit; ``num_cached_tokens`` counts prompt tokens that
    the decode worker held already, so that nobody had to send them; ``first_step_s`` runs from the commit to the first
    step, and is None where there was no commit or no step.  Of ``num_drafted_tokens``, looked up in the text so far,
    ``num_accepted_tokens`` turned out right: each saved a step."""

    wait_for_kv_s: float
    compute_s: float
    num_steps: int
    num_cached_tokens: int
    prefilled_locally: bool
    num_preemptions: int
    first_step_s: float | None
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timeline:
    """Where a request's time went, seen from the gateway.  Offsets count from the request's arrival there.
    ``prefill_worker`` is empty, ``transfer`` and ``ticket_s`` None, when the decode worker computed the prompt itself.
    ``line_s`` was spent in the gateway's line, for the workers to have room.
    ``opened_s`` and ``ticket_s`` are of the last attempt: its stream to the decode worker, and the ticket's arrival."""

    tokenize_s: float
    route_s: float
    ttft_s: float
    total_s: float
    itl_p50_s: float
    itl_p99_s: float
    prefill_worker: str
    decode_worker: str
    prefill: PrefillStats | None
    transfer: TransferStats | None
    decode: DecodeStats | None
    num_retries: int
    route_reason: str
    opened_s: float
    ticket_s: float | None
    line_s: float = 0.0

    @property
    def handover_s(self) -> float | None:
        """From the end of the last chunk's compute to the decode worker's first step, at most: what splitting adds between
        the two.  Each worker measured its part by its own clock; the way back of the commit's answer is in both."""
        if self.transfer is None or self.decode is None or self.decode.first_step_s is None:
            return None
        return self.transfer.exposed_s + self.decode.first_step_s


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.  ``seed`` is the one in use, so that the answer can be had again."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    usage: Usage
    timeline: Timeline
    request_id: str
    model: str
    seed: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.tokens)

    @property
    def logprobs(self) -> tuple[float, ...] | None:
        """One for each token, or None when none were asked for."""
        values = tuple(token.logprob for token in self.tokens if token.logprob is not None)
        return values if values else None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """``revision`` is a fingerprint of weights and tokenizer; ``context_length`` counts prompt and answer together."""

    name: str
    revision: str
    context_length: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """KV blocks of one worker: free + active + cached + lent + quarantined = total."""

    total: int
    free: int
    active: int
    cached: int
    lent: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a worker's KV blocks lie in memory; blocks move only between equal fingerprints."""

    fingerprint: str
    block_size_tokens: int
    block_nbytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class PhaseUse:
    """A worker's time in one phase: ``share`` of its last seconds, and seconds since start.  FLOPs and bytes since start
    are counted from shapes.  Over the last seconds of work in the phase: ``intensity`` in FLOP/byte, and FLOP/s (``mfu``)
    and bytes/s (``mbu``) as shares of what the machine does at most.  0 where not measured, and of transfer and idle."""

    share: float
    seconds: float
    flops: float = 0.0
    nbytes: float = 0.0
    intensity: float = 0.0
    mfu: float = 0.0
    mbu: float = 0.0


@dataclass(frozen=True, slots=True)
class Phases:
    """Where a worker's time goes; the shares add up to 1."""

    prefill: PhaseUse
    decode: PhaseUse
    transfer: PhaseUse
    idle: PhaseUse


@dataclass(frozen=True, slots=True)
class TransportPath:
    """A way for KV between pools: "shared-memory", "tcp", "rdma", or "unknown" to this version.  Two workers share it where
    ``scope`` is equal too: the host, or the link layer."""

    kind: str
    scope: str


@dataclass(frozen=True, slots=True)
class StepSums:
    """Of the steps that a worker computed since it started: what ``kvferry calibrate --live`` fits costs to.  A step that
    took t seconds, where e were expected by the steps before, has shares x: 1, its prompt tokens, pairs of a prompt token
    and one that it attends to, sequences that decode, tokens of their context; it counts w times, once and for each of
    these sequences.  ``ratios`` sums w x t / e², ``products`` the upper triangle of w times the outer product of x/e with
    itself, row by row, ``squares`` w (t/e)².  ``scatter``, of steps that decode and nothing else: how many, their seconds,
    and the sums of ln(t/e) and of its square; empty of workers of before."""

    seconds: float
    shares: tuple[float, ...]
    ratios: tuple[float, ...]
    products: tuple[float, ...]
    scatter: tuple[float, ...] = ()
    squares: float = 0.0


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker as the gateway sees it.  Rates are tokens per second over its last seconds of work, 0 until
    measured; ``num_queued_prefill_tokens`` counts prompt tokens accepted and not yet computed.  Pinned blocks, which
    other workers read under ``num_pins`` leases, are among the active ones.  The host's memory holds ``num_host_blocks``
    besides, of the ``num_host_slots`` that it has room for.

    It speaks with gateways and other workers by the protocols from the oldest to the newest; ``paths`` are ways to its
    pool, empty where they are not known; ``labels`` say where it runs.  ``phases`` and ``step_sums`` are None
    of a worker that does not tell.  What it wrote into other pools went at ``transfer_bytes_per_s``, and a commit took
    ``transfer_round_trip_s``, both 0 until measured."""

    worker_id: str
    incarnation: int
    role: WorkerRole
    control_address: str
    version: str
    model: ModelInfo
    layout: Layout
    blocks: BlockCounts
    num_running: int
    num_waiting: int
    num_queued_prefill_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    draining: bool
    num_pins: int
    num_pinned_blocks: int
    num_host_blocks: int
    num_host_slots: int
    oldest_protocol: int
    newest_protocol: int
    paths: tuple[TransportPath, ...]
    labels: Mapping[str, str]
    phases: Phases | None = None
    step_sums: StepSums | None = None
    transfer_bytes_per_s: float = 0.0
    transfer_round_trip_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """``view_age_s`` counts from when the gateway last heard from the directory: its view may be that old."""

    model: ModelInfo
    workers: tuple[Worker, ...]
    view_age_s: float
    num_requests_in_flight: int
    num_requests_total: int
    version: str


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """How long an answered request was and took.  ``age_s`` is since it arrived; ``itl_p99_s`` and ``tpot_s`` are None of
    an answer of one token."""

    age_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    ttft_s: float
    itl_p99_s: float | None
    tpot_s: float | None
    total_s: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one gateway, in order of arrival; of requests that arrived more than ``since_s`` ago some may be missing."""

    model: ModelInfo
    since_s: float
    served: tuple[ServedRequest, ...]


@dataclass(frozen=True, slots=True)
class RouteOption:
    """One way to serve a request, and what it was predicted to take: ``queue_s`` until the prompt's turn, ``prefill_s`` for
    what is not cached, ``ship_s`` for the handover and the bytes that the decode worker lacks, ``stall_s`` that its
    other requests lose while it computes the prompt itself, as the gateway weighs them, ``decode_s`` for the answer's
    first tokens.  Without a ``prefill_worker`` (empty) the decode worker computes the prompt.  ``full`` ones, whose
    decode worker has too few blocks to begin, come last.  The cached tokens are those of the prompt, on either side.
    Where there is a ``pull_worker``, whoever computes the prompt reads that many tokens' blocks from it first, in
    ``pull_s``, and others will wait ``evict_s`` for the cached blocks that made room for them."""

    decode_worker: str
    prefill_worker: str
    chosen: bool
    full: bool
    queue_s: float
    prefill_s: float
    ship_s: float
    stall_s: float
    decode_s: float
    total_s: float
    num_prefill_cached_tokens: int
    num_decode_cached_tokens: int
    pull_worker: str = ""
    num_pulled_tokens: int = 0
    pull_s: float = 0.0
    evict_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Why one attempt at a request went where it did.  ``options``, cheapest first, are all that keep the chosen decode
    worker and the cheapest of each other one; ``passed_over`` says of workers that could not be chosen why.  ``policy`` is
    empty and there are no options where nobody could serve it.  ``age_s`` counts from the decision, ``view_age_s`` is how
    long before it the gateway had last heard from the directory."""

    policy: str
    reason: str
    num_prompt_tokens: int
    age_s: float
    view_age_s: float
    options: tuple[RouteOption, ...]
    passed_over: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Each part is the path of a PEM file, or its content as bytes.  Without ``root_certificates`` the system's are
    used; ``private_key`` and ``certificate_chain`` go together and make the client show a certificate of its own."""

    root_certificates: str | Path | bytes | None = None
    private_key: str | Path | bytes | None = field(default=None, repr=False)
    certificate_chain: str | Path | bytes | None = None
