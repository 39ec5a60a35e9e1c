"""Writers whose blocks arrived damaged, and from whom none are taken for a while.  Pure: times come in."""

from __future__ import annotations

from collections import OrderedDict

from services.decode.tickets import WriterId

MAX_WRITERS = 1024


class Distrust:
    """One owner's view: with this process as the other half, each entry quarantines a pair.  It is a process that is
    distrusted, not a name: a worker's next incarnation starts clean."""

    def __init__(self, lifetime_s: float, max_writers: int = MAX_WRITERS) -> None:
        """Of more than ``max_writers`` at a time the one that would be trusted again soonest is forgotten."""
        self._lifetime_s = lifetime_s
        self._max_writers = max_writers
        self._until_s: OrderedDict[WriterId, float] = OrderedDict()  # the earliest first

    def add(self, writer: WriterId, *, now_s: float) -> None:
        """Distrusts the writer from now on for the whole lifetime, however often it was added before."""
        self._until_s[writer] = now_s + self._lifetime_s
        self._until_s.move_to_end(writer)
        if len(self._until_s) > self._max_writers:
            self._until_s.popitem(last=False)

    def remaining_s(self, writer: WriterId, *, now_s: float) -> float:
        """How long nothing is to be taken from the writer; 0 when it is trusted."""
        until_s = self._until_s.get(writer)
        if until_s is None:
            return 0.0
        if until_s <= now_s:
            del self._until_s[writer]
            return 0.0
        return until_s - now_s
