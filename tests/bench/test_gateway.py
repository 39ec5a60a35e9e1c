"""The gateway bench's own parts: a stamp says when it was made, and frames are read wherever they were cut."""

from __future__ import annotations

import socket

import pytest

from tests.bench.gateway.stamps import NUM_IDS, UNIT_S, age_s, stamp
from tests.bench.gateway.wire import DATA, HEADERS, Connection, StreamEndedError


@pytest.mark.parametrize("age", [0.0, 0.0004, 0.3, 1.9])
def test_a_stamp_says_its_age(age: float) -> None:
    made_s = 123_456.789
    assert age_s(stamp(made_s), made_s + age) == pytest.approx(age, abs=2 * UNIT_S)
    assert age_s(stamp(made_s), made_s + age + NUM_IDS * UNIT_S) == pytest.approx(age, abs=2 * UNIT_S)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def message(text: bytes) -> bytes:
    return b"\0" + len(text).to_bytes(4, "big") + text


@pytest.mark.parametrize("nbytes", [1, 7, 1000])
def test_messages_come_whole_however_they_were_cut(nbytes: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = Connection("{}:{}".format(*listener.getsockname()), "/a/b")
        server, _ = listener.accept()
        with server, connection.socket:
            split = message(b"three")
            sent = (
                frame(DATA, 0, 1, message(b"one") + message(b"")) + frame(DATA, 0, 1, split[:4])
                + frame(DATA, 0, 3, message(b"two")) + frame(DATA, 0, 1, split[4:])
            )  # fmt: skip
            got = []
            for at in range(0, len(sent), nbytes):
                server.sendall(sent[at : at + nbytes])
                got += list(connection.receive())
            assert got == [(1, b"one"), (1, b""), (3, b"two"), (1, b"three")]
            server.sendall(frame(HEADERS, 1, 3, b"trailers"))
            with pytest.raises(StreamEndedError, match="stream 3 was ended by frame 1"):
                list(connection.receive())
