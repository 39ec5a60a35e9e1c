"""One of several directories' copy of what they share: read once, then led on by the log, entry by entry.

No clock and no socket.  Each entry names the revision that it leads on from, so whatever the log has lost, be it to its
bound or to a crash of the store, shows as a break, and the copy is read anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.directory.events import BlockChange, BlocksChanged, Event, Joined, Worker
from services.directory.state import ClusterState


@dataclass(frozen=True, slots=True)
class Entry:
    """One step of the log; without events when it says something that this version does not know."""

    previous: int
    revision: int
    events: tuple[Event, ...]


class LogBrokenError(Exception):
    """What the copy has seen and what the log has do not join up."""


class Replica:
    """To be read: ``begin``, ``add_blocks`` of each worker, ``complete``.  The parts need not be of one moment: ``begin``
    names the head of the log before all of them and ``complete`` the head after, and once the entries in between have been
    taken, on top of parts that may have them already, the copy is what the log says.  Until then ``state`` is None.

    A part may hold what the store loses before ``complete``, of which the log then knows nothing.  So both name the store's
    life, which ends where anything can be lost."""

    def __init__(self, new_state: Callable[[int], ClusterState]) -> None:
        self._new_state = new_state
        self._state: ClusterState | None = None
        self._whole_from: int | None = None
        self._life = ""

    @property
    def state(self) -> ClusterState | None:
        """To be read, not changed."""
        state = self._state
        whole_from = self._whole_from
        return state if state is not None and whole_from is not None and state.revision >= whole_from else None

    @property
    def is_read(self) -> bool:
        """Whether the log alone leads on; otherwise it is to be read from the beginning."""
        return self._whole_from is not None

    @property
    def revision(self) -> int:
        """Of the last entry taken; the next must lead on from it."""
        assert self._state is not None, "begin comes first"
        return self._state.revision

    def begin(self, head: int, workers: Sequence[Worker], life: str) -> None:
        """Drops what was there.  ``life``: as of before."""
        self.drop()
        self._life = life
        self._state = self._new_state(head)
        self._state.seed([Joined(worker) for worker in workers])

    def add_blocks(self, worker_id: str, changes: Sequence[BlockChange]) -> None:
        """Part of what the worker's account says, from its beginning on."""
        assert self._state is not None, "begin comes first"
        incarnation = self._state.workers[worker_id].incarnation
        self._state.seed([BlocksChanged(worker_id, incarnation, tuple(changes))])

    def complete(self, head: int, life: str) -> None:
        """``life``: as of after.  Raises LogBrokenError when something may have been lost while it was read."""
        if life != self._life:
            raise LogBrokenError("the store began another life while it was read")
        self.check_head(head)
        self._whole_from = head

    def check_head(self, head: int) -> None:
        """``head``: of the log, as of later than the last entry taken."""
        if head < self.revision:
            raise LogBrokenError(f"the log ends at {head}, and {self.revision} was seen")

    def is_behind(self, head: int) -> bool:
        return self.revision < head

    def take(self, entry: Entry) -> None:
        """Raises LogBrokenError, with nothing changed, when entries are missing before this one."""
        assert self._state is not None, "begin comes first"
        if entry.previous != self._state.revision:
            raise LogBrokenError(f"entry {entry.revision} follows {entry.previous}, and not {self._state.revision}")
        self._state.apply(entry.revision, entry.events)

    def drop(self) -> None:
        """To be read from the beginning."""
        self._state = self._whole_from = None
