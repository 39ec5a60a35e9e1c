"""One ticket on the writer's side: which blocks to write when, when to commit, when it has stopped.  Pure.

    WRITING ──all written and the first token drawn──▶ COMMITTING ──accepted──▶ DONE
       │                                                   │
       └────stop, cancel or failure──▶ STOPPING ◀──refused─┘
                                          └──last write has ended──▶ STOPPED

The source blocks may be released in DONE and STOPPED only: before that a write may be reading them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class FerryState(Enum):
    WRITING = auto()
    COMMITTING = auto()
    STOPPING = auto()
    STOPPED = auto()
    DONE = auto()


@dataclass(frozen=True, slots=True)
class Write:
    """Copy these source blocks (ours) onto these target blocks (the owner's), pairwise."""

    source: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    num_blocks: int


@dataclass(frozen=True, slots=True)
class CancelWrites:
    pass


@dataclass(frozen=True, slots=True)
class Stopped:
    """No write is under way and none will start: the source may be released and the owner told."""

    reason: str


Action = Write | Commit | CancelWrites | Stopped


class Ferry:
    def __init__(
        self, targets: tuple[int, ...], first_block_index: int, num_prompt_tokens: int, block_size: int
    ) -> None:
        """``targets[i]`` receives block ``first_block_index + i`` of the prompt.  ValueError when the ticket does not name
        exactly the blocks from there to the prompt's end."""
        num_blocks = -(-num_prompt_tokens // block_size)
        if first_block_index + len(targets) != num_blocks:
            raise ValueError(
                f"the ticket names blocks {first_block_index} to {first_block_index + len(targets)}, a prompt of "
                f"{num_prompt_tokens} tokens ends at block {num_blocks}"
            )
        self.state = FerryState.WRITING
        self.reason = ""
        self._targets = targets
        self._first = first_block_index
        self._num_prompt_tokens = num_prompt_tokens
        self._block_size = block_size
        self._source: tuple[int, ...] = ()
        self._num_posted = 0  # of targets
        self._in_flight = 0
        self._drawn = False

    def started(self, block_table: tuple[int, ...], num_computed: int) -> list[Action]:
        """Compute began with these source blocks; the first ``num_computed`` tokens' KV is there already."""
        self._source = block_table
        return self.computed(num_computed)

    def computed(self, num_tokens: int) -> list[Action]:
        """KV of the first ``num_tokens`` tokens of the prompt is in the source blocks; only its last may be partial."""
        if self.state is not FerryState.WRITING:
            return []
        whole = num_tokens == self._num_prompt_tokens
        ready = (len(self._targets) + self._first) if whole else num_tokens // self._block_size
        begin, end = self._num_posted, max(self._num_posted, ready - self._first)
        if begin == end:
            return self._maybe_commit()
        self._num_posted = end
        self._in_flight += 1
        return [Write(self._source[self._first + begin : self._first + end], self._targets[begin:end])]

    def drawn(self) -> list[Action]:
        """The first token was drawn."""
        self._drawn = True
        return self._maybe_commit()

    def written(self) -> list[Action]:
        """A write has ended well."""
        self._in_flight -= 1
        return self._maybe_stopped() or self._maybe_commit()

    def write_failed(self, reason: str) -> list[Action]:
        """A write has ended badly or was cancelled: it will touch nothing any more."""
        self._in_flight -= 1
        if self.state is FerryState.STOPPING:
            return self._maybe_stopped()
        return self.stop(reason)

    def committed(self) -> None:
        assert self.state is FerryState.COMMITTING
        self.state = FerryState.DONE

    def stop(self, reason: str) -> list[Action]:
        """Write no more, for whatever reason; a refused commit comes here too.  Idempotent."""
        if self.state in (FerryState.STOPPING, FerryState.STOPPED, FerryState.DONE):
            return []
        self.state = FerryState.STOPPING
        self.reason = reason
        return self._maybe_stopped() or [CancelWrites()]

    def _maybe_stopped(self) -> list[Action]:
        if self.state is FerryState.STOPPING and self._in_flight == 0:
            self.state = FerryState.STOPPED
            return [Stopped(self.reason)]
        return []

    def _maybe_commit(self) -> list[Action]:
        done = self._num_posted == len(self._targets) and self._in_flight == 0 and self._drawn
        if self.state is FerryState.WRITING and done:
            self.state = FerryState.COMMITTING
            return [Commit(len(self._targets))]
        return []
