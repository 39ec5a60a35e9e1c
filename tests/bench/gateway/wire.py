"""The client's side of gRPC, cut down to what the bench needs: many streams of one method over one HTTP/2 connection,
read with so little work that the clients do not take the machine from what is measured.  (RFC 9113; headers are sent as
RFC 7541 literals; a message never spans more than the frames of its own stream.)
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
WINDOW_UPDATE = 8
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
MAX_WINDOW = 2**31 - 1
INITIAL_WINDOW_SIZE = 4
RECEIVE_NBYTES = 1 << 18


class StreamEndedError(Exception):
    """The server ended a stream, or the connection."""


class Connection:
    """A connected socket; the caller waits until it can be read.  Windows are as large as HTTP/2 has them, so the server
    is never held back."""

    def __init__(self, address: str, path: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._headers = b"".join(
            _literal(name, value)
            for name, value in (
                (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", address),
                ("te", "trailers"), ("content-type", "application/grpc"),
            )
        )  # fmt: skip
        self._next_id = 1
        self._received = b""
        self._parts: dict[int, bytes] = {}  # of messages that are not whole yet
        settings = struct.pack(">HI", INITIAL_WINDOW_SIZE, MAX_WINDOW)
        more = struct.pack(">I", MAX_WINDOW - 65_535)
        self.socket.sendall(PREFACE + _frame(SETTINGS, 0, 0, settings) + _frame(WINDOW_UPDATE, 0, 0, more))

    def open(self, request: bytes) -> int:
        """The new stream's id."""
        id_, self._next_id = self._next_id, self._next_id + 2
        message = struct.pack(">BI", 0, len(request)) + request
        self.socket.sendall(_frame(HEADERS, END_HEADERS, id_, self._headers) + _frame(DATA, END_STREAM, id_, message))
        return id_

    def receive(self) -> Iterator[tuple[int, bytes]]:
        """(stream, message) of what has come; blocks where nothing has.  Raises StreamEndedError."""
        got = self.socket.recv(RECEIVE_NBYTES)
        if not got:
            raise StreamEndedError("the server closed the connection")
        data = self._received + got
        at, size = 0, len(data)
        while size - at >= 9:
            length = int.from_bytes(data[at : at + 3], "big")
            if size - at < 9 + length:
                break
            kind, flags = data[at + 3], data[at + 4]
            id_ = int.from_bytes(data[at + 5 : at + 9], "big")
            payload = data[at + 9 : at + 9 + length]
            at += 9 + length
            if kind == DATA:
                yield from self._messages(id_, payload)
            else:
                self._control(kind, flags, id_, payload)
        self._received = data[at:]

    def _messages(self, id_: int, payload: bytes) -> Iterator[tuple[int, bytes]]:
        data = self._parts.pop(id_, b"") + payload
        at = 0
        while len(data) - at >= 5 and len(data) - at - 5 >= (length := int.from_bytes(data[at + 1 : at + 5], "big")):
            yield id_, data[at + 5 : at + 5 + length]
            at += 5 + length
        if at < len(data):
            self._parts[id_] = data[at:]

    def _control(self, kind: int, flags: int, id_: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            self.socket.sendall(_frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self.socket.sendall(_frame(PING, ACK, 0, payload))
        elif kind in (RST_STREAM, GOAWAY) or (kind == HEADERS and flags & END_STREAM):
            raise StreamEndedError(f"stream {id_} was ended by frame {kind}: {payload!r}")


def _frame(kind: int, flags: int, id_: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, id_) + payload


def _literal(name: str, value: str) -> bytes:
    """Without indexing, new name, no Huffman code; both shorter than 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
