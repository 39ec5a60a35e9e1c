"""A region in a further process of its owner."""

from __future__ import annotations

import subprocess
import sys

import pytest

import transport
from transport import BadDescriptor, Op, PeerLost, TransportError

BORROWER = """
import sys, transport
memory = transport.borrow(bytes.fromhex(sys.argv[1]))
assert memory.device is None
assert bytes(memory.view[:5]) == b"ours!"
memory.view[5:12] = b"theirs!"
print(memory.nbytes, flush=True)
sys.stdin.read()
"""


def test_a_process_loads_and_stores_in_what_it_was_lent() -> None:
    with (
        transport.create("ucx") as owner,
        transport.create("ucx") as peer,
        owner.allocate(10_000) as region,
        peer.allocate(4096) as local,
        peer.open(region.descriptor) as remote,
    ):
        region.view[:5] = b"ours!"
        command = [sys.executable, "-c", BORROWER, region.lend().hex()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as borrower:
            assert borrower.stdout is not None
            assert borrower.stdout.readline() == "10000\n"
            assert bytes(region.view[:12]) == b"ours!theirs!"
            peer.post(Op.READ, local, remote, [0], [5], 7).wait(10)
            assert bytes(local.view[:7]) == b"theirs!", "a peer reaches it through the owner"
        assert borrower.returncode == 0
        assert bytes(region.view[:12]) == b"ours!theirs!"


def test_a_region_that_was_released_is_not_borrowed() -> None:
    with transport.create("ucx") as owner:
        with owner.allocate(4096) as region:
            lent = region.lend()
        with pytest.raises(PeerLost):
            transport.borrow(lent)


@pytest.mark.parametrize("lent", [b"", b"\x01", b"\x03" + bytes(80), bytes(41)])
def test_what_lends_nothing_is_refused(lent: bytes) -> None:
    with pytest.raises(BadDescriptor):
        transport.borrow(lent)


def test_the_loopback_lends_nothing() -> None:
    with transport.create("loopback") as t, pytest.raises(TransportError, match="cannot be lent"):
        t.allocate(4096).lend()
