"""What is said of a pull before and after it.  Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    PULLED = "pulled"
    CACHED = "cached"  # nothing was lacking any more
    REFUSED = "refused"  # by the holder
    GONE = "gone"  # the holder has none of the blocks any more
    UNLIKE = "unlike"  # its blocks are not laid out as ours
    UNSAFE = "unsafe"  # its pool is not mapped here
    NO_ROOM = "no_room"  # in our pool, beside those who run or wait
    BUSY = "busy"  # with as many pulls as may be
    LATE = "late"
    LOST = "lost"  # the holder
    UNPROVEN = "unproven"  # the pin may have ended before the read did
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Source:
    """Who holds blocks of a prompt.  ``num_blocks`` leading ones of the prompt are to be had, within so many seconds."""

    worker_id: str
    incarnation: int
    control_address: str
    num_blocks: int
    within_s: float


@dataclass(frozen=True, slots=True)
class PullReport:
    """``elapsed_s`` until the request could go on; the blocks and bytes are those that are cached here by the pull, also
    where another request had begun it."""

    holder: str
    outcome: Outcome
    num_blocks: int
    num_bytes: int
    elapsed_s: float
    busy_s: float
