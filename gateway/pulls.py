"""Whose cached blocks a worker would read before it computes a prompt, and what that takes.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.candidates import Candidate, Rates, WorkerKey

# A copy takes the room of other cached blocks, of which so many would have been asked for again and are then computed.  So
# who has the blocks already is to be preferred for a while.
ASKED_AGAIN = 0.2


@dataclass(frozen=True, slots=True)
class Pull:
    """``num_blocks`` that the worker lacks on its device, and ``holder`` has on its; ``total_blocks`` of the prompt in the
    end.  Reading them takes ``pull_s``; computing them, or copying what the host has, would take ``compute_s``.
    ``evict_s``: what others will wait for cached blocks that make room for what neither its device nor its host has."""

    holder: Candidate
    num_blocks: int
    total_blocks: int
    pull_s: float
    evict_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class _Place:
    """Blocks move as they are, through memory: between pools of one layout on one host."""

    fingerprint: str
    host: str


class Pulls:
    """Of one request, among the workers of one view.  A worker that is asked for lacks what it has not cached; the last
    token of a prompt is always computed, so its block is never pulled."""

    def __init__(
        self, candidates: Sequence[Candidate], rates: Mapping[WorkerKey, Rates], num_prompt_tokens: int
    ) -> None:
        self._rates = rates
        self._num_prompt_tokens = num_prompt_tokens
        # The longest prefix first; of equal ones who has the least to do.
        self._holders = sorted(
            (c for c in candidates if c.num_prefix_device_blocks),
            key=lambda c: (-c.num_prefix_device_blocks, c.num_requests, c.key.worker_id),
        )
        self._by_place: dict[_Place, list[Candidate]] = {}
        for holder in self._holders:
            if holder.host:
                self._by_place.setdefault(_place(holder), []).append(holder)

    def best(self, worker: Candidate) -> Pull | None:
        """None where nobody has more of the prompt that could be read, or computing it is at least as quick."""
        longest = self._longest(worker)
        return longest if longest is not None and longest.pull_s < longest.compute_s else None

    def explain(self, worker: Candidate) -> str:
        """In words; empty where nobody has more of the prompt."""
        longest = self._longest(worker)
        if longest is not None:
            what = f"{longest.num_blocks} blocks from {longest.holder.key.worker_id}"
            times = f"in {longest.pull_s:.3f} s instead of computing them in {longest.compute_s:.3f} s"
            return f"pulls {what}, {times}" if longest.pull_s < longest.compute_s else f"does not pull {what} {times}"
        tokens = worker.num_prefix_blocks * worker.block_size
        with_more = (h for h in self._holders if h.num_prefix_device_blocks * h.block_size > tokens)
        reasons = ((h.key.worker_id, _why_not(worker, h)) for h in with_more if h.key != worker.key)
        return next((f"does not pull from {worker_id}: {why}" for worker_id, why in reasons if why), "")

    def _longest(self, worker: Candidate) -> Pull | None:
        """What the worker has on its host is read too: it would find nothing of what lies behind it."""
        usable = (self._num_prompt_tokens - 1) // worker.block_size
        on_device, known = worker.num_prefix_device_blocks, worker.num_prefix_blocks
        most, taken = known - on_device, None
        for holder in self._by_place.get(_place(worker), ()):
            lacking = min(holder.num_prefix_device_blocks, usable) - on_device
            if lacking <= most:
                break
            if not holder.abilities.protocol.overlaps(worker.abilities.protocol):
                continue
            if (count := min(lacking, holder.num_pinnable_blocks)) > most:
                most, taken = count, holder
        if taken is None:
            return None
        rates = self._rates[worker.key]
        computed = (on_device + most - known) * worker.block_size
        copied = (known - on_device) * worker.block_nbytes
        return Pull(
            holder=taken,
            num_blocks=most,
            total_blocks=on_device + most,
            pull_s=rates.pull_overhead_s + most * worker.block_nbytes / rates.pull_bytes_per_s,
            evict_s=ASKED_AGAIN * computed / rates.prefill_tokens_per_s,
            compute_s=computed / rates.prefill_tokens_per_s + copied / rates.host_load_bytes_per_s,
        )


def _place(worker: Candidate) -> _Place:
    return _Place(worker.fingerprint, worker.host)


def _why_not(worker: Candidate, holder: Candidate) -> str:
    if holder.fingerprint != worker.fingerprint:
        return "its blocks have another size or type"
    if not holder.abilities.protocol.overlaps(worker.abilities.protocol):
        return f"it speaks protocol {holder.abilities.protocol}, the other {worker.abilities.protocol}"
    if not worker.host or holder.host != worker.host:
        return "it is on another host, and reads over a network are not safe for it yet"
    if not holder.num_pinnable_blocks:
        return "as much of its cache is pinned as may be, or it has several ranks"
    return ""
