"""Everything the transport raises.

TransportError
├── BackendUnavailable   the backend cannot run here; the message says what to do
├── OutOfMemory          a region of this size cannot be had; the message says what to do
├── BadDescriptor        bytes that are no descriptor of this backend; nothing was touched
├── OutOfBounds          a piece lies outside a region; no byte was moved
├── RegionBusy           in use by a transfer or by a view; try again once that has ended
├── PeerLost             the region's owner died or cannot be reached; bytes may have arrived, or not
├── TransferCancelled    cancelled before the end; the writer has stopped, no byte will follow
└── TransportClosed      the transport, region or remote region was closed before or meanwhile
"""

from __future__ import annotations


class TransportError(Exception):
    """Root of all errors of the transport, and what an operation fails with for a reason of the backend's own."""


class BackendUnavailable(TransportError):
    pass


class OutOfMemory(TransportError):
    pass


class BadDescriptor(TransportError):
    pass


class OutOfBounds(TransportError):
    pass


class RegionBusy(TransportError):
    pass


class PeerLost(TransportError):
    pass


class TransferCancelled(TransportError):
    pass


class TransportClosed(TransportError):
    pass
