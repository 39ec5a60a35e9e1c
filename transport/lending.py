"""A region's memory in further processes of its owner, which load and store there and know of no transport.

Peers go on to reach the region through its owner alone, so what proves that the owner's process has ended proves that
nobody transfers from or into it any more.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

from transport.cuda import DeviceSegment, open_exported
from transport.errors import BadDescriptor, PeerLost, TransportError
from transport.segments import CannotMap, Segment, SegmentName, open_segment

_HOST = struct.Struct("<B16sIIQQ")  # 1, the segment's name, bytes, the owner's incarnation
_DEVICE = struct.Struct("<BIQ64s")  # 2, GPU, bytes, the driver's handle


class BorrowedMemory:
    """Stays until the process ends.  ``device``: see ``Region``."""

    def __init__(self, address: int, nbytes: int, device: int | None) -> None:
        self.address = address
        self.nbytes = nbytes
        self.device = device

    @property
    def view(self) -> memoryview:
        """As ``Region.view``."""
        if self.device is not None:
            raise TransportError("memory of a GPU cannot be looked at from the host")
        return memoryview((ctypes.c_ubyte * self.nbytes).from_address(self.address)).cast("B")


def lender(segment: Segment | DeviceSegment, incarnation: int) -> Callable[[], bytes]:
    """What ``Region.lend`` returns, of a region in ``segment``."""

    def lend() -> bytes:
        if isinstance(segment, DeviceSegment):
            return _DEVICE.pack(2, segment.device, segment.nbytes, segment.export())
        name = segment.name
        return _HOST.pack(1, name.host, name.pid, name.fd, segment.nbytes, incarnation)

    return lend


def borrow(lent: bytes) -> BorrowedMemory:
    """By a process of the owner's user, on its host.  Blocks for milliseconds.  Raises TransportError."""
    if len(lent) == _HOST.size and lent[0] == 1:
        _, host, pid, fd, nbytes, incarnation = _HOST.unpack(lent)
        try:
            segment = open_segment(SegmentName(host, pid, fd), nbytes, incarnation)
        except CannotMap as e:
            raise PeerLost(f"the region cannot be mapped: {e}") from e
        return BorrowedMemory(segment.address, nbytes, None)
    if len(lent) == _DEVICE.size and lent[0] == 2:
        _, device, nbytes, handle = _DEVICE.unpack(lent)
        return BorrowedMemory(open_exported(device, handle), nbytes, device)
    raise BadDescriptor("these bytes lend no region")
