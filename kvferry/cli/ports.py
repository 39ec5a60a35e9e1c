"""Finding free TCP ports, and saying clearly when one is not free."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable
from contextlib import ExitStack

LOOPBACK = "127.0.0.1"


class PortError(Exception):
    """One sentence that says which port cannot be had, and why."""


def pick_free(count: int, avoid: Iterable[int] = ()) -> list[int]:
    """Different ports of the loopback address that nobody listens on now; they are held together while choosing."""
    avoided = set(avoid)
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            listener = held.enter_context(socket.socket())
            listener.bind((LOOPBACK, 0))
            port = listener.getsockname()[1]
            if port not in avoided:
                ports.append(port)
    return ports


def check_free(host: str, port: int, flag: str) -> None:
    """Raises PortError when ``port`` cannot be listened on; ``flag`` is what to choose another with."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise PortError(f"{host} is not an address: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as listener:
        # Like a server would: passes over connections that are closing, not over a listener.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = f"port {port} on {host} is taken by another process; stop it or choose another with {flag}"
            elif error.errno == errno.EACCES:
                reason = f"port {port} is reserved for root; choose one above 1023 with {flag}"
            elif error.errno == errno.EADDRNOTAVAIL:
                reason = f"{host} is not an address of this machine; choose another with --host"
            else:
                reason = f"port {port} on {host} cannot be listened on: {error.strerror}"
            raise PortError(reason) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``.  Names other than localhost are not resolved, and are not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable(host: str) -> str:
    """Where a client on this machine reaches a server that listens on ``host``."""
    return {"0.0.0.0": LOOPBACK, "": LOOPBACK, "::": "::1"}.get(host, host)
