"""Block events as protobuf has them, on the wire and in the store."""

from __future__ import annotations

from kvferry import errors
from kvferry.api.directory.v1 import directory_pb2
from services.directory.events import BlockChange, Cleared, Removed, Stored
from services.runtime.tier import Tier


def to_change(event: directory_pb2.BlockEvent) -> BlockChange:
    """Raises InvalidRequestError for what this version does not know."""
    tier = Tier.of(event.tier)
    if tier is None:
        raise errors.InvalidRequestError(f"this directory knows no tier {event.tier}")
    match event.WhichOneof("event"):
        case "stored":
            return Stored(event.stored, tier)
        case "removed":
            return Removed(event.removed, tier)
        case "cleared":
            return Cleared()
        case _:
            raise errors.InvalidRequestError("a block event must say stored, removed or cleared")


def to_block_event(change: BlockChange) -> directory_pb2.BlockEvent:
    match change:
        case Stored(hashes, tier):
            return directory_pb2.BlockEvent(stored=hashes, tier=directory_pb2.Tier.ValueType(tier.value))
        case Removed(hashes, tier):
            return directory_pb2.BlockEvent(removed=hashes, tier=directory_pb2.Tier.ValueType(tier.value))
        case Cleared():
            return directory_pb2.BlockEvent(cleared=directory_pb2.Cleared())
