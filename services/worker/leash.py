"""Ends a process with the one that started it."""

from __future__ import annotations

import os
import select
import socket
import threading


def end_with(connection: socket.socket) -> None:
    """From now on this process ends, with status 1, as soon as the other end of ``connection`` is closed, whatever is being
    computed or waited for; also of a process that is killed, the system closes it.  Reads nothing from it."""
    threading.Thread(target=_wait, args=(connection,), name="leash", daemon=True).start()


def _wait(connection: socket.socket) -> None:
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    os._exit(1)
