"""What is known of the cluster as of a revision, and the events that led there; watchers and lookups are served from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from services.directory.events import (
    BlocksChanged,
    Event,
    Joined,
    Left,
    LoadChanged,
    Stored,
    Worker,
    apply_change,
    event_nbytes,
)
from services.directory.index import DEFAULT_MAX_ENTRIES, BlockIndex, Prefix
from services.runtime.tier import Tier

# So many hashes are in one event of a snapshot at most (512 KiB).
_SNAPSHOT_HASHES = 1 << 15


class ClusterState:
    """Not thread-safe, but counts may be read from any thread.

    Revisions only grow, and none ever stands for two states.  The history keeps the latest steps, at most ``max_events``
    and about ``max_history_nbytes``; the index holds at most ``max_index_entries`` pairs of block and worker.
    """

    def __init__(
        self,
        revision: int,
        *,
        max_events: int = 100_000,
        max_history_nbytes: int = 64 << 20,
        max_index_entries: int = DEFAULT_MAX_ENTRIES,
    ) -> None:
        assert revision > 0, "0 asks for a snapshot"
        self._revision = revision
        self._max_events = max_events
        self._max_history_nbytes = max_history_nbytes
        # Steps, oldest first: each one's events and the revision that they led to.  The first led on from _base_revision.
        self._history: deque[tuple[int, tuple[Event, ...]]] = deque()
        self._base_revision = revision
        self._history_nbytes = 0
        self._num_events = 0
        self._workers: dict[str, Worker] = {}
        self._index = BlockIndex(max_entries=max_index_entries)

    @property
    def revision(self) -> int:
        return self._revision

    @property
    def num_events(self) -> int:
        """Applied since this object was made."""
        return self._num_events

    @property
    def workers(self) -> Mapping[str, Worker]:
        """By worker_id."""
        return MappingProxyType(self._workers)

    @property
    def index(self) -> BlockIndex:
        """To be read, not changed."""
        return self._index

    def apply(self, revision: int, events: Sequence[Event]) -> None:
        """One step: all of ``events``, which led to ``revision``.  What concerns an incarnation that is not there changes
        nothing, and what is applied again leads to the same state in the end."""
        assert revision > self._revision, f"revision {revision} after {self._revision}"
        for event in events:
            self._apply(event)
        self._revision = revision
        self._num_events += len(events)
        self._history.append((revision, tuple(events)))
        self._history_nbytes += sum(map(event_nbytes, events))
        while len(self._history) > self._max_events or self._history_nbytes > self._max_history_nbytes:
            self._base_revision, gone = self._history.popleft()
            self._history_nbytes -= sum(map(event_nbytes, gone))

    def seed(self, events: Sequence[Event]) -> None:
        """Takes in part of a snapshot of the present revision.  No step: nobody may have watched yet."""
        assert not self._history, "a snapshot comes before what follows it"
        for event in events:
            self._apply(event)

    def longest_prefix(self, hashes: bytes) -> list[tuple[Worker, Prefix]]:
        """How much of the chain each worker holds that holds any of it.  Raises ValueError when ``hashes`` are not 16
        bytes each."""
        return [(self._workers[worker_id], prefix) for worker_id, prefix in self._index.longest_prefix(hashes).items()]

    def snapshot(self) -> list[Event]:
        """What a watcher that knows nothing needs in order to know everything; all Joined come first."""
        events: list[Event] = [Joined(worker) for worker in self._workers.values()]
        for worker_id, worker in self._workers.items():
            for tier in Tier:
                for hashes in self._index.held_by(worker_id, tier, _SNAPSHOT_HASHES):
                    events.append(BlocksChanged(worker_id, worker.incarnation, (Stored(hashes, tier),)))
        return events

    def events_since(self, revision: int) -> list[Event] | None:
        """The events after ``revision``, oldest first; None when the history does not reach back that far, or the
        revision is none that it knows."""
        if not self._base_revision <= revision <= self._revision:
            return None
        missing: list[tuple[Event, ...]] = []
        for reached, events in reversed(self._history):
            if reached <= revision:
                if reached < revision:
                    return None
                break
            missing.append(events)
        else:
            if revision != self._base_revision:
                return None
        return [event for events in reversed(missing) for event in events]

    def check_integrity(self) -> None:
        """Raises AssertionError when the accounts do not add up."""
        self._index.check_integrity()
        assert set(self._index.num_blocks_by_worker()) <= set(self._workers), "blocks of a worker that is gone"
        assert sum(event_nbytes(event) for _, events in self._history for event in events) == self._history_nbytes, (
            "the history's size is wrong"
        )
        revisions = [self._base_revision, *(revision for revision, _ in self._history)]
        assert revisions == sorted(set(revisions)), "revisions out of order"
        assert revisions[-1] == self._revision, "the history does not lead to the present"

    def _apply(self, event: Event) -> None:
        match event:
            case Joined(worker):
                self._workers[worker.worker_id] = worker
                # Its blocks follow.
                self._index.cleared(worker.worker_id)
            case Left(worker_id, incarnation, _) if self._is_present(worker_id, incarnation):
                del self._workers[worker_id]
                self._index.cleared(worker_id)
            case LoadChanged(worker_id, incarnation, load) if self._is_present(worker_id, incarnation):
                self._workers[worker_id] = replace(self._workers[worker_id], load=load)
            case BlocksChanged(worker_id, incarnation, changes) if self._is_present(worker_id, incarnation):
                for change in changes:
                    apply_change(self._index, worker_id, change)

    def _is_present(self, worker_id: str, incarnation: int) -> bool:
        worker = self._workers.get(worker_id)
        return worker is not None and worker.incarnation == incarnation
