"""The bytes that let another process reach a region."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from transport.errors import BadDescriptor
from transport.segments import SegmentName

# Little-endian: magic, version, backend, incarnation, base, nbytes, the segment's host, process and number there, length
# of the address, length of the key; then the address, the key and a digest of all before it.
_HEAD = struct.Struct("<4sBBQQQ16sIIHH")
_MAGIC = b"KVFR"
_VERSION = 2
_DIGEST_BYTES = 16
_BACKENDS = {"ucx": 1, "loopback": 2}
_NO_SEGMENT = SegmentName(bytes(16), 0, 0)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """``incarnation`` is new with every transport that starts, so it tells a restarted owner from the one before.
    ``base`` and ``nbytes`` are the region in the owner's memory; ``segment`` names it to processes of its host, None where
    nobody can map it; ``address`` is the owner's worker and ``key`` the right to reach the region through it."""

    backend: str
    incarnation: int
    base: int
    nbytes: int
    segment: SegmentName | None = None
    address: bytes = b""
    key: bytes = b""

    def pack(self) -> bytes:
        segment = self.segment or _NO_SEGMENT
        head = _HEAD.pack(_MAGIC, _VERSION, _BACKENDS[self.backend], self.incarnation, self.base, self.nbytes,
                          segment.host, segment.pid, segment.fd, len(self.address), len(self.key))  # fmt: skip
        body = head + self.address + self.key
        return body + _digest(body)

    @classmethod
    def unpack(cls, data: bytes, *, backend: str) -> Descriptor:
        """Raises BadDescriptor unless ``data`` is, byte for byte, what ``pack`` made for ``backend``.  UCX checks nothing
        it unpacks, so a damaged descriptor must end here; the digest catches accidents, it is no signature."""
        if len(data) < _HEAD.size + _DIGEST_BYTES:
            raise BadDescriptor(f"a region descriptor of {len(data)} bytes is too short")
        magic, version, code, incarnation, base, nbytes, host, pid, fd, num_address, num_key = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise BadDescriptor("not a region descriptor")
        if version != _VERSION:
            raise BadDescriptor(f"the region descriptor has version {version}, this process speaks {_VERSION}")
        if len(data) != _HEAD.size + num_address + num_key + _DIGEST_BYTES:
            raise BadDescriptor(f"the region descriptor's length, {len(data)} bytes, contradicts its head")
        body = data[:-_DIGEST_BYTES]
        if _digest(body) != data[-_DIGEST_BYTES:]:
            raise BadDescriptor("the region descriptor is damaged")
        if code != _BACKENDS[backend]:
            raise BadDescriptor(f"the region descriptor belongs to another backend than {backend}")
        if nbytes == 0 or base + nbytes > 1 << 64:
            raise BadDescriptor(f"the region descriptor names an impossible range: {nbytes} bytes at {base:#x}")
        address, key = body[_HEAD.size : _HEAD.size + num_address], body[_HEAD.size + num_address :]
        segment = SegmentName(host, pid, fd)
        if pid == 0 and segment != _NO_SEGMENT:
            raise BadDescriptor("the region descriptor names a segment of no process")
        return cls(backend, incarnation, base, nbytes, segment if pid else None, bytes(address), bytes(key))


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()
