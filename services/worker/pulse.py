"""Whether the thread that moves KV goes on.  A worker without it would look well, take requests and finish none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transport import TransportError

LOOK_EVERY_S = 0.5
# So many looks in a row that find it where it was.  Looks are counted and not seconds: of a process that was stopped as a
# whole, the thread goes on with whoever looks.
NUM_LOOKS = 20


class Pulse:
    """Pure."""

    def __init__(self, num_looks: int) -> None:
        self._num_looks = num_looks
        self._last: int | None = None
        self._num_same = 0

    def stopped(self, now: int) -> bool:
        """Whether ``now``, which grows while all is well, is for the ``num_looks``-th time in a row what it was before."""
        self._num_same = self._num_same + 1 if now == self._last else 0
        self._last = now
        return self._num_same >= self._num_looks


@contextmanager
def watched(
    pulse: Callable[[], int],
    end: Callable[[str], None],
    *,
    every_s: float = LOOK_EVERY_S,
    num_looks: int = NUM_LOOKS,
) -> Iterator[None]:
    """While entered, a thread of its own (the event loop may be waiting for what will not come) looks at ``pulse``, that of
    Transport, every so often.  When it raises TransportError, or has stood still for so many looks, ``end`` is called, in
    that thread, with why, and nobody looks any more."""
    leaving = threading.Event()

    def look() -> None:
        heart = Pulse(num_looks)
        while not leaving.wait(every_s):
            try:
                if not heart.stopped(pulse()):
                    continue
                why = f"the transport's thread has stood still for {every_s * num_looks:g} s"
            except TransportError as e:
                why = str(e)
            end(why)
            return

    watcher = threading.Thread(target=look, name="pulse", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        leaving.set()
        watcher.join()
