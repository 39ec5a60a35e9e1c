from __future__ import annotations

import socket

from transport.sockets import Connection, bound_delivery, parse_undelivered, undelivered

TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:9CF5 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1094865 1 0 100 0 0 10 0
   1: 047212C6:8497 057212C6:9495 06 00000000:00000000 03:00000194 00000000     0        0 0 3 0
   2: 047212C6:C919 057212C6:9495 01 0000035A:00000000 01:00000A5E 00000007     0        0 1094962 3 0 100 0 0 10 0
   3: 047212C6:8E27 067212C6:B105 04 0019DAB4:00000000 01:000009DE 00000007     0        0 0 3 0 100 0 0 10 0
"""


def test_connections_with_something_to_deliver_are_found_whoever_has_them() -> None:
    assert list(parse_undelivered(TABLE)) == [
        Connection("047212C6:C919", "057212C6:9495"),
        Connection("047212C6:8E27", "067212C6:B105"),
    ]


def test_what_nobody_takes_is_undelivered_until_it_is_taken() -> None:
    def number(address: tuple[str, int]) -> str:
        return f"{int.from_bytes(socket.inet_aton(address[0]), 'little'):08X}:{address[1]:04X}"

    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        ours = Connection(number(client.getsockname()), number(client.getpeername()))
        assert ours not in undelivered()
        client.setblocking(False)
        total = 0
        try:
            while True:
                total += client.send(b"x" * 65536)
        except BlockingIOError:
            assert ours in undelivered()
        with accepted:
            while total:
                total -= len(accepted.recv(1 << 20))
            accepted.settimeout(5)
        assert ours not in undelivered()


def test_only_tcp_connections_without_a_limit_get_one() -> None:
    with (
        socket.socket() as plain,
        socket.socket() as limited,
        socket.socket(type=socket.SOCK_DGRAM),
    ):
        limited.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 3_000)
        bound_delivery(7_000)
        assert plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7_000
        assert limited.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3_000
