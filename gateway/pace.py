"""When what has gathered for the clients is sent: at once while the loop keeps up, less often while it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

# Of the time that sending took, how much belongs to reading before more is sent.
REST_SHARE = 1.0
MAX_REST_S = 0.5


class Pace:
    """Wakes together all streams that have something to send, then lets the loop read for as long as that kept it busy.

    So sending has half of an overloaded loop's time at most, and what is read in the other half shares messages.  A loop
    that keeps up rests for no longer than a step's tokens took to send.  (Whether there is more to read, gRPC does not
    say: a read takes several turns of a loop that is busy with sends that have ended.)  Owned by the event loop."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []
        self._is_set = False

    def add(self, wake: Callable[[], None]) -> None:
        """``wake`` is called once, soon, and must not raise."""
        self._due.append(wake)
        if not self._is_set:
            self._is_set = True
            # Not now: whoever adds may have more to add.
            asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        began_s = time.monotonic()
        due, self._due = self._due, []
        for wake in due:
            wake()
        # Runs after the tasks that were woken: the loop takes what is ready in order.
        asyncio.get_running_loop().call_soon(self._rest, began_s)

    def _rest(self, began_s: float) -> None:
        rest_s = min(REST_SHARE * (time.monotonic() - began_s), MAX_REST_S)
        asyncio.get_running_loop().call_later(rest_s, self._go_on)

    def _go_on(self) -> None:
        self._is_set = bool(self._due)
        if self._due:
            self._wake()
