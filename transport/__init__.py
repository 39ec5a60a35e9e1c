"""One-sided transfers between memory regions of processes.  ``create("ucx")`` or, for tests, ``create("loopback")``."""

from __future__ import annotations

from transport.base import Counters, Op, Path, Region, RemoteRegion, Transfer, TransferResult, Transport
from transport.errors import (
    BackendUnavailable,
    BadDescriptor,
    OutOfBounds,
    OutOfMemory,
    PeerLost,
    RegionBusy,
    TransferCancelled,
    TransportClosed,
    TransportError,
)
from transport.lending import BorrowedMemory, borrow

__all__ = [
    "BackendUnavailable",
    "BadDescriptor",
    "BorrowedMemory",
    "Counters",
    "Op",
    "OutOfBounds",
    "OutOfMemory",
    "Path",
    "PeerLost",
    "Region",
    "RegionBusy",
    "RemoteRegion",
    "Transfer",
    "TransferCancelled",
    "TransferResult",
    "Transport",
    "TransportClosed",
    "TransportError",
    "borrow",
    "create",
]


def create(name: str) -> Transport:
    """A started transport, "ucx" or "loopback".  Raises BackendUnavailable with what to do, ValueError for other names."""
    if name == "ucx":
        from transport.ucp import UcpTransport

        return UcpTransport()
    if name == "loopback":
        from transport.loopback import LoopbackTransport

        return LoopbackTransport()
    raise ValueError(f'no transport is called "{name}"; there are ucx and loopback')
