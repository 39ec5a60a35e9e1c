"""Which workers serve a request.  Pure: a view of the cluster in, a choice and its reason out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto


class Role(Enum):
    PREFILL = auto()
    DECODE = auto()


@dataclass(frozen=True, slots=True)
class WorkerKey:
    """One incarnation of one worker."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as the gateway sees it now: what it last reported and what this gateway has sent it since."""

    key: WorkerKey
    role: Role
    address: str
    content_fingerprint: str  # of its KV layout: workers of equal content can be paired
    block_size: int
    num_requests: int
    num_queued_prefill_tokens: int
    num_free_blocks: int  # free or evictable
    num_prefix_blocks: int  # of this prompt, in its prefix cache
    prefill_tokens_per_s: float  # 0 while unmeasured


@dataclass(frozen=True, slots=True)
class Route:
    """``prefill`` None: the decode worker computes the prompt itself."""

    decode: Candidate
    prefill: Candidate | None
    reason: str


class NoWorkerError(Exception):
    """No decode worker can take the request."""


def choose_route(
    candidates: Sequence[Candidate], num_prompt_tokens: int, excluded: frozenset[WorkerKey], min_ship_tokens: int
) -> Route:
    """The decode worker with the fewest requests, among equals the one that holds most of the prompt; the prefill worker
    that would finish the prompt soonest.  A prompt of which the decode worker lacks fewer than ``min_ship_tokens`` is
    computed there: fetching it would take longer.  Ties go to the lowest worker id, so equal views give equal routes.
    Raises NoWorkerError."""
    usable = [c for c in candidates if c.key not in excluded]
    decoders = [c for c in usable if c.role is Role.DECODE]
    if not decoders:
        known = sum(c.role is Role.DECODE for c in candidates)
        raise NoWorkerError(f"no decode worker can take the request ({known} known, all failed it)" if known else
                            "no decode worker has joined the cluster")  # fmt: skip

    def decode_cost(c: Candidate) -> tuple[bool, int, int, str]:
        need = -(-(num_prompt_tokens + 1) // c.block_size) - c.num_prefix_blocks
        return (need > c.num_free_blocks, c.num_requests, -c.num_prefix_blocks, c.key.worker_id)

    decode = min(decoders, key=decode_cost)
    missing = num_prompt_tokens - decode.num_prefix_blocks * decode.block_size
    if missing < min_ship_tokens:
        return Route(decode, None, f"{decode.key.worker_id} lacks {missing} of {num_prompt_tokens} prompt tokens only")
    prefillers = [c for c in usable if c.role is Role.PREFILL and c.content_fingerprint == decode.content_fingerprint]
    if not prefillers:
        return Route(decode, None, f"no prefill worker matches {decode.key.worker_id}; it computes the prompt itself")
    rates = [c.prefill_tokens_per_s for c in prefillers if c.prefill_tokens_per_s > 0]
    typical_rate = sum(rates) / len(rates) if rates else 1.0

    def seconds(c: Candidate) -> float:
        uncached = max(1, num_prompt_tokens - c.num_prefix_blocks * c.block_size)
        return (c.num_queued_prefill_tokens + uncached) / (c.prefill_tokens_per_s or typical_rate)

    prefill = min(prefillers, key=lambda c: (seconds(c), c.key.worker_id))
    expected = f"about {seconds(prefill):.2f} s" if rates else "its speed not measured yet"
    return Route(
        decode,
        prefill,
        f"prefill on {prefill.key.worker_id} ({expected}, {prefill.num_queued_prefill_tokens} tokens queued, "
        f"{prefill.num_prefix_blocks} blocks cached), decode on {decode.key.worker_id} ({decode.num_requests} requests, "
        f"{decode.num_prefix_blocks} blocks cached)",
    )
