"""What the directory tells its watchers: who came and went, and what entered and left their caches."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from services.directory.index import BlockIndex
from services.runtime.tier import Tier

# What an event without payload is taken to need in the history.
_EVENT_NBYTES = 256


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class LeaveReason(Enum):
    DEREGISTERED = "deregistered"
    EXPIRED = "expired"
    REPLACED = "replaced"


@dataclass(frozen=True, slots=True)
class Worker:
    """``info`` and ``load`` are opaque here: the encoded descriptions that watchers get."""

    worker_id: str
    incarnation: int
    role: Role
    info: bytes
    load: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    hashes: bytes
    """16 bytes each, back to back."""
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class Removed:
    hashes: bytes
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class Cleared:
    """In all tiers."""


BlockChange = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class Joined:
    worker: Worker


@dataclass(frozen=True, slots=True)
class Left:
    worker_id: str
    incarnation: int
    reason: LeaveReason


@dataclass(frozen=True, slots=True)
class LoadChanged:
    worker_id: str
    incarnation: int
    load: bytes


@dataclass(frozen=True, slots=True)
class BlocksChanged:
    worker_id: str
    incarnation: int
    changes: tuple[BlockChange, ...]


Event = Joined | Left | LoadChanged | BlocksChanged


def apply_change(index: BlockIndex, worker_id: str, change: BlockChange) -> None:
    match change:
        case Stored(hashes, tier):
            index.stored(worker_id, hashes, tier)
        case Removed(hashes, tier):
            index.removed(worker_id, hashes, tier)
        case Cleared():
            index.cleared(worker_id)


def event_nbytes(event: Event) -> int:
    """About what the event needs in memory and on the wire."""
    match event:
        case Joined(worker):
            return _EVENT_NBYTES + len(worker.info) + len(worker.load)
        case LoadChanged():
            return _EVENT_NBYTES + len(event.load)
        case BlocksChanged():
            payload = sum(len(c.hashes) for c in event.changes if not isinstance(c, Cleared))
            return _EVENT_NBYTES * len(event.changes) + payload
        case Left():
            return _EVENT_NBYTES
