"""One ticket on the writer's side: which tokens' KV to write when, when to commit, when it has stopped.  Pure.

    WRITING ──all written and the first token drawn──▶ COMMITTING ──accepted──▶ DONE
       │                                                   │
       └────stop, cancel or failure──▶ STOPPING ◀──refused─┘
                                          └──last write has ended──▶ STOPPED

The source blocks may be released in DONE and STOPPED only: before that a write may be reading them.  A write lasts from
the action to ``written`` or ``write_failed``, whatever conversion it takes on the way.
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
    """The KV of the prompt's tokens [first_token, end_token), which fill ``num_blocks`` of the owner's blocks but for the
    prompt's last."""

    first_token: int
    end_token: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Commit:
    num_blocks: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class CancelWrites:
    pass


@dataclass(frozen=True, slots=True)
class Stopped:
    """No write is under way and none will start: the source may be released and the owner told."""

    reason: str


Action = Write | Commit | CancelWrites | Stopped


class Ferry:
    def __init__(self, num_blocks: int, first_block_index: int, num_prompt_tokens: int, block_size: int) -> None:
        """The owner lends ``num_blocks`` blocks of ``block_size`` tokens, for the prompt from block ``first_block_index``
        on.  ValueError when these are not exactly the blocks from there to the prompt's end."""
        end = -(-num_prompt_tokens // block_size)
        if first_block_index + num_blocks != end:
            raise ValueError(
                f"the ticket names blocks {first_block_index} to {first_block_index + num_blocks} of {block_size} tokens, "
                f"a prompt of {num_prompt_tokens} tokens ends at block {end}"
            )
        self.state = FerryState.WRITING
        self.reason = ""
        self._first = first_block_index
        self._end = end
        self._num_prompt_tokens = num_prompt_tokens
        self._block_size = block_size
        self._posted = first_block_index  # the first block not written yet
        self._in_flight = 0
        self._drawn = False

    def computed(self, num_tokens: int) -> list[Action]:
        """KV of the first ``num_tokens`` tokens of the prompt is there to be written.  It goes by whole blocks of the
        owner's, so that no block is written in two goes."""
        if self.state is not FerryState.WRITING:
            return []
        ready = self._end if num_tokens == self._num_prompt_tokens else num_tokens // self._block_size
        begin, end = self._posted, max(self._posted, ready)
        if begin == end:
            return self._maybe_commit()
        self._posted = end
        self._in_flight += 1
        return [Write(self._token(begin), self._token(end), end - begin)]

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
        done = self._posted == self._end and self._in_flight == 0 and self._drawn
        if self.state is FerryState.WRITING and done:
            self.state = FerryState.COMMITTING
            return [Commit(self._end - self._first, self._token(self._end) - self._token(self._first))]
        return []

    def _token(self, block_index: int) -> int:
        return min(block_index * self._block_size, self._num_prompt_tokens)
