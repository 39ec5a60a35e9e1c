"""What the kernel has yet to deliver over tcp, and how long it tries.  UCX has no words for either."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_TABLES = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
_LISTEN = "0A"


class Connection(NamedTuple):
    """Addresses and ports as the kernel's tables write them."""

    local: str
    remote: str


def bound_delivery(timeout_ms: int) -> None:
    """From now on each tcp connection of this process for which nobody has set a limit is aborted by the kernel, which
    then sends nothing more on it, when its peer acknowledges nothing for so long.  By default a host that is out of reach
    is tried for 15 minutes, and what lay in the socket is delivered when it is back.  Any thread; costs microseconds a
    descriptor."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # it is none, or has been closed meanwhile
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if (
                    connection.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) == socket.IPPROTO_TCP
                    and connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
                ):
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)


def undelivered() -> frozenset[Connection]:
    """The tcp connections of this network namespace, those of processes that have ended among them, on which something
    was sent that the other side's kernel has not acknowledged.  Who leaves this set once has delivered, or will never
    deliver, all that was sent before."""
    found: set[Connection] = set()
    for table in _TABLES:
        with suppress(FileNotFoundError):  # without IPv6
            found.update(parse_undelivered(table.read_text(encoding="ascii")))
    return frozenset(found)


def parse_undelivered(table: str) -> Iterator[Connection]:
    """Of one table (proc(5), /proc/net/tcp)."""
    for line in table.splitlines()[1:]:
        _, local, remote, state, queues, *_ = line.split()
        if state != _LISTEN and int(queues.partition(":")[0], 16):
            yield Connection(local, remote)
