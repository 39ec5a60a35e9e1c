"""Ends a process with the one that started it."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable


def end_with(connection: socket.socket, clean_up: Callable[[], None]) -> None:
    """From now on this process ends, with status 1, as soon as the other end of ``connection`` is closed, whatever is being
    computed or waited for; also of a process that is killed, the system closes it.  ``clean_up`` is called before that, on
    a thread of its own, and must not raise.  Reads nothing from the connection."""
    threading.Thread(target=_wait, args=(connection, clean_up), name="leash", daemon=True).start()


def _wait(connection: socket.socket, clean_up: Callable[[], None]) -> None:
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    clean_up()
    os._exit(1)
