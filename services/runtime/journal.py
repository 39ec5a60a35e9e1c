"""What entered and left a worker's prefix cache and has yet to be told to the directory."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from kvferry.api.directory.v1 import directory_pb2
from services.runtime.tier import Tier


class _Kind(Enum):
    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


@dataclass(slots=True)
class _Entry:
    kind: _Kind
    tier: Tier
    hashes: list[bytes]


class BlockJournal:
    """A bounded queue of block events, oldest first.  Thread-safe; nothing blocks.

    When more than ``max_hashes`` wait, all are dropped and the journal is ``broken``: only a snapshot of the whole cache
    can bring the directory up to date again.  It starts out broken, as the directory knows nothing yet.
    """

    def __init__(self, max_hashes: int) -> None:
        self._max_hashes = max_hashes
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []
        self._num_hashes = 0
        self._broken = True

    def stored(self, hashes: Sequence[bytes], tier: Tier) -> None:
        self._add(_Kind.STORED, hashes, tier)

    def removed(self, hashes: Sequence[bytes], tier: Tier) -> None:
        self._add(_Kind.REMOVED, hashes, tier)

    def cleared(self) -> None:
        with self._lock:
            if not self._broken:
                self._entries, self._num_hashes = [_Entry(_Kind.CLEARED, Tier.DEVICE, [])], 0

    def break_(self) -> None:
        """The directory has lost track; what waits is of no use to it."""
        with self._lock:
            self._entries, self._num_hashes, self._broken = [], 0, True

    def mend(self) -> None:
        """From now on events are kept again.  To be called before the snapshot is taken: an event that is in both does
        no harm, one that is in neither would be lost."""
        with self._lock:
            self._broken = False

    @property
    def broken(self) -> bool:
        with self._lock:
            return self._broken

    def take(self, max_hashes: int) -> list[directory_pb2.BlockEvent]:
        """Removes and returns the oldest events, of about ``max_hashes`` hashes in all; none when nothing waits."""
        with self._lock:
            taken, num_taken = 0, 0
            for entry in self._entries:
                if taken and num_taken + len(entry.hashes) > max_hashes:
                    break
                taken, num_taken = taken + 1, num_taken + len(entry.hashes)
            entries, self._entries = self._entries[:taken], self._entries[taken:]
            self._num_hashes -= num_taken
        return [_event(entry.kind, entry.tier, entry.hashes) for entry in entries]

    def _add(self, kind: _Kind, hashes: Sequence[bytes], tier: Tier) -> None:
        if not hashes:
            return
        with self._lock:
            if self._broken:
                return
            if self._num_hashes + len(hashes) > self._max_hashes:
                self._entries, self._num_hashes, self._broken = [], 0, True
                return
            self._num_hashes += len(hashes)
            last = self._entries[-1] if self._entries else None
            if last is not None and last.kind is kind and last.tier is tier:
                last.hashes.extend(hashes)
            else:
                self._entries.append(_Entry(kind, tier, list(hashes)))


def snapshot_events(held: Mapping[Tier, Sequence[bytes]], max_hashes: int) -> list[directory_pb2.BlockEvent]:
    """What replaces everything the directory knew of this worker: cleared, then what is ``held`` by tier, in events of at
    most ``max_hashes``."""
    events = [directory_pb2.BlockEvent(cleared=directory_pb2.Cleared())]
    for tier, hashes in held.items():
        parts = (hashes[i : i + max_hashes] for i in range(0, len(hashes), max_hashes))
        events += [_event(_Kind.STORED, tier, part) for part in parts]
    return events


def _event(kind: _Kind, tier: Tier, hashes: Sequence[bytes]) -> directory_pb2.BlockEvent:
    number = directory_pb2.Tier.ValueType(tier.value)
    if kind is _Kind.STORED:
        return directory_pb2.BlockEvent(stored=b"".join(hashes), tier=number)
    if kind is _Kind.REMOVED:
        return directory_pb2.BlockEvent(removed=b"".join(hashes), tier=number)
    return directory_pb2.BlockEvent(cleared=directory_pb2.Cleared())
