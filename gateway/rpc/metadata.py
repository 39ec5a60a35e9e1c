"""Headers and what gRPC makes of them.  Pure.
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence

Headers = Sequence[tuple[str, str]]
Metadata = tuple[tuple[str, str | bytes], ...]

_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_NOT_METADATA = ("te", "content-type")
_ENTRY_NBYTES = 32  # beside its own, as HPACK counts


def nbytes_of(headers: Headers) -> int:
    return sum(len(name) + len(value) + _ENTRY_NBYTES for name, value in headers)


def incoming(headers: Headers) -> Metadata:
    """What the caller gave.  Raises ValueError for bytes that are no base64."""
    return tuple(
        (name, _decoded(value) if name.endswith("-bin") else value)
        for name, value in headers
        if not name.startswith((":", "grpc-")) and name not in _NOT_METADATA
    )


def outgoing(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[str, str]]:
    return [
        (name.lower(), base64.b64encode(value).decode().rstrip("=") if isinstance(value, bytes) else value)
        for name, value in metadata
    ]


def timeout_s(text: str) -> float:
    """Of the header grpc-timeout.  Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,8})([HMSmun])", text)
    if match is None:
        raise ValueError(f"{text[:32]!r} is no grpc-timeout")
    return int(match[1]) * _UNITS_S[match[2]]


def percent_encoded(text: str) -> str:
    """As the header grpc-message wants it."""
    return "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}"
        for byte in text.encode("utf-8", "replace")
    )


def _decoded(value: str) -> bytes:
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
