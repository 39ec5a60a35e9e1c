"""What routing knows of a worker.  Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from services.runtime.place import NOWHERE, Distance, Place
from services.runtime.protocol import FIRST, Protocol


class Role(Enum):
    PREFILL = auto()
    DECODE = auto()


@dataclass(frozen=True, slots=True)
class WorkerKey:
    """One incarnation of one worker."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Rates:
    """What a worker measured of itself; what is not above 0, or not finite, counts as not measured.  A decode step of
    ``n`` sequences takes ``step_base_s + n * step_per_sequence_s``, a pull ``pull_overhead_s`` and what its bytes take."""

    prefill_tokens_per_s: float = 0.0
    step_base_s: float = 0.0
    step_per_sequence_s: float = 0.0
    transfer_bytes_per_s: float = 0.0
    transfer_round_trip_s: float = 0.0
    host_load_bytes_per_s: float = 0.0
    pull_bytes_per_s: float = 0.0
    pull_overhead_s: float = 0.0


class Path(NamedTuple):
    """A way between pools, shared by all who have it.  ``kind`` may be one that this gateway does not know."""

    kind: str
    scope: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.scope})" if self.scope else self.kind


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a worker registered of how it works with others.  Constant over an incarnation.  ``paths`` None: not known,
    taken to be any."""

    protocol: Protocol = FIRST
    paths: frozenset[Path] | None = None


@dataclass(frozen=True, slots=True)
class TransferRate:
    """What a worker measured of its writes to owners at one distance; 0 or less is not measured, as in ``Rates``."""

    distance: Distance
    bytes_per_s: float
    round_trip_s: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as the gateway sees it now: what it last reported and what this gateway has sent it since."""

    key: WorkerKey
    role: Role
    address: str
    content_fingerprint: str  # of its KV layout: workers of equal content can be paired
    block_size: int
    block_nbytes: int
    num_requests: int
    num_queued_prefill_tokens: int
    num_free_blocks: int  # free or evictable, and nobody's there is expected to take them
    num_prefix_blocks: int  # of this prompt, in its prefix cache
    num_prefix_host_blocks: int = 0  # of these, those that it must copy from its host's memory
    rates: Rates = Rates()
    draining: bool = False
    fingerprint: str = ""  # of its KV layout, block size and type included
    host: str = ""  # equal for workers that can map each other's pools; empty where that is not known
    num_pinnable_blocks: int = 0  # that others may pin there now
    num_expected_answer_tokens: int = 0  # of an answer that may have any length
    abilities: Abilities = Abilities()
    place: Place = NOWHERE
    transfer_rates: tuple[TransferRate, ...] = ()

    def num_uncached(self, num_prompt_tokens: int) -> int:
        """Prompt tokens that it would have to compute; the last one always, for its logits."""
        return max(1, num_prompt_tokens - self.num_prefix_blocks * self.block_size)

    def num_missing_blocks(self, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.block_size) - self.num_prefix_blocks)

    @property
    def num_prefix_device_blocks(self) -> int:
        """Of this prompt, what others could read."""
        return self.num_prefix_blocks - self.num_prefix_host_blocks
