"""gRPC's messages in HTTP/2's DATA frames.  Pure.
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, RFC 9113 section 6.1."""

from __future__ import annotations

import struct

PREFIX_NBYTES = 5


class FramingError(Exception):
    """What came is no message that this server reads; the text says why."""


class TooLargeError(FramingError):
    """A message is larger than the limit."""


class CompressedError(FramingError):
    """A message is compressed, which none need be: this server accepts no encoding."""


# A DATA frame's head, whose length is three bytes, and a message's prefix.
_HEADS = struct.Struct(">BHxxIxI")


def prefixed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def data_frame(stream_id: int, payload: bytes | memoryview) -> bytes:
    """``payload`` must not be larger than the peer takes frames."""
    return len(payload).to_bytes(3, "big") + b"\0\0" + stream_id.to_bytes(4, "big") + payload


def message_frame(stream_id: int, message: bytes) -> bytes:
    """``data_frame(stream_id, prefixed(message))``, made at once."""
    nbytes = len(message)
    high, low = divmod(nbytes + PREFIX_NBYTES, 1 << 16)
    return _HEADS.pack(high, low, stream_id, nbytes) + message


class Messages:
    """A stream's payload, cut into messages as it comes."""

    def __init__(self, limit_nbytes: int) -> None:
        self._limit_nbytes = limit_nbytes
        self._data = bytearray()

    @property
    def nbytes(self) -> int:
        """Of a message that is not whole yet."""
        return len(self._data)

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are whole now.  Raises FramingError."""
        self._data += data
        found = []
        while len(self._data) >= PREFIX_NBYTES:
            size = int.from_bytes(self._data[1:PREFIX_NBYTES], "big")
            if self._data[0] != 0:
                raise CompressedError("compressed messages are not read here; send them as they are")
            if size > self._limit_nbytes:
                raise TooLargeError(f"a message of {size} bytes is larger than the limit of {self._limit_nbytes}")
            if len(self._data) < PREFIX_NBYTES + size:
                break
            found.append(bytes(self._data[PREFIX_NBYTES : PREFIX_NBYTES + size]))
            del self._data[: PREFIX_NBYTES + size]
        return found
