"""What a writer sent over a connection that broke, until it can arrive no more."""

from __future__ import annotations

from collections.abc import Callable, Set

from transport.sockets import Connection, undelivered


class Arriving:
    """Made when the connection has broken: UCX sends nothing more on it, but the kernel may.  Which of the connections it
    was is not known, so it is all those that had something to deliver then."""

    def __init__(self, look: Callable[[], Set[Connection]] = undelivered) -> None:
        self._look = look
        self._left = look()
        self._asked = False

    def has_ended(self) -> bool:
        """Whether the kernel sends nothing of it any more.  False at first in any case: so an owner that was told False
        once, and knows that what came may yet lie in a socket of its own, has asked twice."""
        self._left = self._left & self._look()
        first, self._asked = not self._asked, True
        return not first and not self._left
