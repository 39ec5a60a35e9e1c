"""Classes of fault that take a connection: an owner that hangs holds up nothing but its own transfers."""

from __future__ import annotations

import time

import grpc
import numpy as np
import pytest

from kvferry.errors import UnavailableError, from_rpc_error
from tests.integration.hostile.peer import Peer
from tests.integration.hostile.siege import Siege
from tests.integration.reference import Reference

PATHS = ("rma",)


def test_late_write_from_a_dead_source_behind_a_handshake(siege: Siege, peer: Peer, greedy: Reference) -> None:
    """The request ends while the owner does not answer yet: nothing is sent when it does."""
    prompt, other = siege.prompt("Behind a handshake"), siege.prompt("Meanwhile")
    ticket = peer.ticket(siege.running.info("prefill-0"), prompt, range(7))
    before = peer.hashes()
    peer.hang()
    with siege.prefilling(ticket, prompt):
        time.sleep(0.3)  # it is on its way
    peer.go_on()  # before it counts as lost
    assert greedy.continuation_is_greedy(other, siege.answer(other))
    time.sleep(0.5)
    assert peer.hashes() == before
    assert peer.heard("CommitTransfer") == []


def test_late_write_from_a_dead_source(siege: Siege, peer: Peer, greedy: Reference) -> None:
    """The request ends while its bytes are under way: until they have arrived, their source belongs to nobody else."""
    prompt, other = siege.prompt("Under way"), siege.prompt("Beside it", 40)
    right, _ = siege.learn(peer, prompt)
    slots = range(20, 27)
    ticket = peer.ticket(siege.running.info("prefill-0"), prompt, slots)
    peer.hang()
    with siege.prefilling(ticket, prompt, b"under way") as call:
        assert next(call).HasField("first_token")
    siege.holds_for("prefill-0", 0.5, active=len(slots))
    answer = siege.answer(other)
    assert siege.blocks("prefill-0").active == len(slots)
    peer.go_on()
    siege.wait_for("prefill-0", 10, "the source is given back", active=0)
    siege.running.wait_until(lambda: bool(peer.heard("AbortTransfer")), 5, "the owner is told")
    kv, late = (np.frombuffer(siege.read(peer.region, where), np.float32) for where in (right, slots))
    arrived = late != 0
    assert np.allclose(late[arrived], kv[arrived], atol=1e-3), "bytes of another request"
    assert greedy.continuation_is_greedy(other, answer)


def test_head_of_line(siege: Siege, peer: Peer, greedy: Reference) -> None:
    """A new peer does not answer: transfers to others go on.  A slow machine gets three attempts, for after two seconds the
    peer counts as lost."""
    prompt, others = siege.prompt("Next in line", 20), siege.prompt("First in line", 20)
    writer = siege.running.info("prefill-0")
    siege.answer(prompt)
    peer.hang()
    for _ in range(3):
        with siege.prefilling(peer.ticket(writer, others, range(2)), others) as call:
            tokens = siege.answer(prompt)
            ahead = not call.done()
            with pytest.raises(grpc.RpcError) as lost:
                list(call)
        error = from_rpc_error(lost.value)
        assert (type(error), error.reason) == (UnavailableError, "OWNER_LOST")
        assert greedy.continuation_is_greedy(prompt, tokens)
        if ahead:
            break
    assert ahead, "each transfer waited for another's handshake"
    peer.go_on()
    siege.learn(peer, others)


def test_timings_that_lie(siege: Siege, peer: Peer) -> None:
    """A transfer lasts until its last byte is in place, and not until it was handed to a socket."""
    prompt = siege.prompt("In a socket", 20)
    siege.learn(peer, prompt)
    ticket = peer.ticket(siege.running.info("prefill-0"), prompt, range(10, 12))
    peer.hang()
    with siege.prefilling(ticket, prompt, b"in a socket") as call:
        assert next(call).HasField("first_token")
        time.sleep(0.5)
        peer.go_on()
        transfer = next(call).committed.transfer
    assert transfer.busy_us >= 450_000
    assert transfer.exposed_us >= transfer.busy_us
    assert transfer.path == "rma"
