"""When what has gathered for the clients is sent: at once while the loop keeps up, less often while it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

# Of the time that sending took, how much belongs to reading before more is sent.
REST_SHARE = 1.0
MAX_REST_S = 0.5
# Of a core's time, what the process must have used to count as behind, and what it must fall below to have caught up.
BEHIND_SHARE, CAUGHT_UP_SHARE = 0.8, 0.5
WINDOW_S = 0.5


class Load:
    """Whether the process uses what a core gives.  Of two minds between the bounds, for rests make it use less."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu_clock: Callable[[], float] = time.process_time
    ) -> None:
        self._clock, self._cpu_clock = clock, cpu_clock
        self._since_s, self._cpu_since_s = clock(), cpu_clock()
        self._is_behind = False

    def is_behind(self) -> bool:
        """Judged anew each ``WINDOW_S``, by what was used since."""
        now_s = self._clock()
        if now_s - self._since_s >= WINDOW_S:
            cpu_s = self._cpu_clock()
            share = (cpu_s - self._cpu_since_s) / (now_s - self._since_s)
            self._is_behind = share > (CAUGHT_UP_SHARE if self._is_behind else BEHIND_SHARE)
            self._since_s, self._cpu_since_s = now_s, cpu_s
        return self._is_behind


class Pace:
    """Wakes together all streams that have something to send; a loop that is behind then reads for as long as that kept it
    busy.

    So sending has half of an overloaded loop's time at most, and what is read in the other half shares messages.  (Whether
    there is more to read, gRPC does not say: a read takes several turns of a loop that is busy with sends that have
    ended.)  Owned by the event loop."""

    def __init__(self, is_behind: Callable[[], bool]) -> None:
        self._is_behind = is_behind
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
        if not self._is_behind():
            self._go_on()
            return
        rest_s = min(REST_SHARE * (time.monotonic() - began_s), MAX_REST_S)
        asyncio.get_running_loop().call_later(rest_s, self._go_on)

    def _go_on(self) -> None:
        self._is_set = bool(self._due)
        if self._due:
            self._wake()
