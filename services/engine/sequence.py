"""One request's tokens and blocks on one worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NewType

from services.engine.lookup import Drafter
from services.engine.ready import Ready
from services.engine.sampling_params import Drawn, Sampling

SequenceId = NewType("SequenceId", str)


class FinishReason(Enum):
    STOP = auto()
    LENGTH = auto()


class Stage(Enum):
    WAITING = auto()  # queued, holds no blocks
    LOADING = auto()  # holds blocks, not started; waits for what is copied into them from the host
    RESERVED = auto()  # its prompt's blocks are lent to a writer
    RUNNING = auto()  # holds blocks; computed a step at a time
    HELD = auto()  # prompt computed, blocks kept until their transfer has ended
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """``tokens`` is the prompt and what was drawn; KV is valid for the first ``num_computed`` of them, once what is loading
    has come.  ``drafter`` is None where nothing is to be guessed.  Steps that are not completed compute ``num_in_steps``
    more and will draw ``num_awaited`` tokens, the last of them as ``awaited_sample`` of the newest step."""

    id: SequenceId
    tokens: list[int]
    sampling: Sampling
    max_tokens: int
    stop_ids: frozenset[int]
    chain: list[bytes]  # root hash, then the hash of each full block known so far
    prefill_only: bool = False
    drafter: Drafter | None = None

    num_prompt: int = field(init=False)
    stage: Stage = field(init=False, default=Stage.WAITING)
    num_computed: int = field(init=False, default=0)
    block_table: list[int] = field(init=False, default_factory=list)
    num_cached: int = field(init=False, default=0)  # prompt tokens found in the prefix cache
    num_remembered: int = field(init=False, default=0)  # blocks whose hash is in the cache index
    is_loading: bool = field(init=False, default=False)  # a copy from the host writes into its blocks
    num_preemptions: int = field(init=False, default=0)
    num_chunks: int = field(init=False, default=0)
    num_drafted: int = field(init=False, default=0)  # tokens guessed and verified
    num_accepted: int = field(init=False, default=0)
    aborted: bool = field(init=False, default=False)
    num_steps: int = field(init=False, default=0)  # that are not completed and name it
    num_in_steps: int = field(init=False, default=0)
    num_awaited: int = field(init=False, default=0)
    awaited_sample: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_to_come(self) -> int:
        """Its tokens when the steps that are not completed have drawn theirs."""
        return len(self.tokens) + self.num_awaited

    @property
    def num_scheduled(self) -> int:
        return self.num_computed + self.num_in_steps

    @property
    def num_to_compute(self) -> int:
        """That no step computes yet."""
        return self.num_to_come - self.num_scheduled


@dataclass(frozen=True, slots=True)
class Started:
    """The sequence got its blocks; ``num_cached`` prompt tokens need no compute.  Their KV is in the pool once ``ready``,
    and by now where that is None."""

    id: SequenceId
    block_table: tuple[int, ...]
    num_cached: int
    ready: Ready | None = None


@dataclass(frozen=True, slots=True)
class Resumed:
    """The first step behind a prompt that was delivered begins: its second token comes when that step ends."""

    id: SequenceId


@dataclass(frozen=True, slots=True)
class ChunkComputed:
    """KV of the first ``num_computed`` tokens of a prompt is in the pool once ``ready``, by now where that is None."""

    id: SequenceId
    num_computed: int
    ready: Ready | None = None


@dataclass(frozen=True, slots=True)
class TokenDrawn:
    """``index`` counts the request's generated tokens from 0; ``finish`` is set on the last one."""

    id: SequenceId
    index: int
    drawn: Drawn
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The model could not be run; the sequence has ended and gave its blocks back."""

    id: SequenceId
    message: str


Event = Started | Resumed | ChunkComputed | TokenDrawn | StepFailed
