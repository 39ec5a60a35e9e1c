"""Classes of fault that others have met in the field, by a hostile owner of a pool: the writer ends with a typed error,
gives back what it held, and serves the next."""

from __future__ import annotations

import time
from typing import Any

import grpc
import pytest

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import AbortedError, ConflictError, UnavailableError, from_rpc_error
from tests.integration.hostile.peer import Peer
from tests.integration.hostile.siege import Siege
from tests.integration.reference import Reference

PATHS = ("mapped",)


def assert_serves(siege: Siege, greedy: Reference, text: str) -> None:
    prompt = siege.prompt(text, 40)
    assert greedy.continuation_is_greedy(prompt, siege.answer(prompt))


def test_failure_not_told(siege: Siege, peer: Peer, greedy: Reference) -> None:
    """The pool is given up while the prompt is computed: who asked for the prefill is told, and soon."""
    prompt = siege.prompt("Given up", 256)
    ticket = peer.ticket(siege.running.info("prefill-0"), prompt, range(16))
    untouched = peer.hashes(range(1))
    with siege.prefilling(ticket, prompt) as call:
        siege.running.wait_until(lambda: peer.hashes(range(1)) != untouched, 30, "the first chunk is written")
        peer.release()
        with pytest.raises(grpc.RpcError) as lost:
            list(call)
    error = from_rpc_error(lost.value)
    assert (type(error), error.reason) == (UnavailableError, "OWNER_LOST")
    siege.wait_for("prefill-0", 2, "the source is given back", active=0)
    assert_serves(siege, greedy, "After a pool was given up")


@pytest.mark.parametrize("commit", ["refuse", "silent"])
def test_receiver_leaks_in_push_mode(siege: Siege, peer: Peer, greedy: Reference, commit: str) -> None:
    """The owner refuses what was written, or says nothing to it until the request is cancelled."""
    prompt = siege.prompt(f"Owners that {commit}")
    peer.behave(commit=commit)
    ticket = peer.ticket(siege.running.info("prefill-0"), prompt, range(7))
    with siege.prefilling(ticket, prompt) as call:
        next(call)
        siege.running.wait_until(lambda: bool(peer.heard("CommitTransfer")), 10, "it commits")
        if commit == "refuse":
            with pytest.raises(grpc.RpcError) as refused:
                next(call)
            error = from_rpc_error(refused.value)
            assert (type(error), error.reason) == (AbortedError, "COMMIT_REFUSED")
            assert "it has changed its mind" in error.message
        else:
            assert_serves(siege, greedy, "Beside a commit that nobody answers")
    siege.wait_for("prefill-0", 2, "the source is given back", active=0)
    siege.running.wait_until(lambda: bool(peer.heard("AbortTransfer")), 5, "the owner is told")


def test_restart_of_a_peer(siege: Siege, peer: Peer) -> None:
    """The owner comes back under its name and at its address, with another pool."""
    prompt = siege.prompt("Owner restarted")
    slots, first_token = siege.learn(peer, prompt)
    kv = peer.hashes(slots[:-1])
    info = siege.running.info("prefill-0")
    stale = peer.ticket(info, prompt, range(7))
    peer.kill()
    with siege.peer(listen=peer.control_address) as successor:
        assert siege.learn(successor, prompt) == (slots, first_token)
        assert successor.hashes(slots[:-1]) == kv, "of whole blocks, that were cached"
        with pytest.raises(UnavailableError) as lost:
            siege.prefill(stale, prompt)
        assert lost.value.reason == "OWNER_LOST"
        assert siege.learn(successor, prompt) == (slots, first_token)
        heard = successor.heard("CommitTransfer")
        assert [int(commit["owner_incarnation"]) for commit in heard] == [successor.incarnation] * 2


def test_a_peers_crash_spreads(siege: Siege, peer: Peer, greedy: Reference) -> None:
    """A peer dies as writer and as owner at once; both workers live, say that they are healthy, and serve."""
    prompt = siege.prompt("Crash", 256)
    pids = siege.pids()
    ticket = peer.ticket(siege.running.info("prefill-0"), prompt, range(16))
    untouched = peer.hashes(range(1))
    with siege.ask(siege.prompt("Crash"), peer.writer()) as asked, siege.prefilling(ticket, prompt) as call:
        peer.write_on(asked.ticket, range(30, 37))
        siege.running.wait_until(lambda: peer.hashes(range(1)) != untouched, 30, "the first chunk is written")
        peer.kill()
        with pytest.raises(grpc.RpcError):
            list(call)
    assert_serves(siege, greedy, "After the crash")
    assert siege.pids() == pids
    for name in ("prefill-0", "decode-0"):
        siege.running.local.wait_ready(name, 5)


LAYOUTS: dict[str, dict[str, Any]] = {
    "another model": {"fingerprint": "f" * 32, "content_fingerprint": "e" * 32},
    "contradicts itself": {"block_size_tokens": 32},
    "unknown type": {"dtype": "float8"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_incompatible_pair(siege: Siege, peer: Peer, layout: str) -> None:
    prompt, info = siege.prompt("Incompatible"), siege.running.info("prefill-0")
    ticket = peer.ticket(info, prompt, range(7))
    ticket.layout.MergeFrom(common_pb2.Layout(**LAYOUTS[layout]))
    before = peer.hashes(), siege.running.stats("prefill-0").num_bytes_written
    with pytest.raises(ConflictError, match="the pools differ") as refused:
        siege.prefill(ticket, prompt)
    assert refused.value.reason == "LAYOUTS_DIFFER"
    assert info.layout.fingerprint in refused.value.message
    assert ticket.layout.fingerprint in refused.value.message
    assert (peer.hashes(), siege.running.stats("prefill-0").num_bytes_written) == before


def test_timings_that_lie(siege: Siege, peer: Peer) -> None:
    """The owner takes its time to accept: the request waits for that, and no byte moves meanwhile."""
    prompt = siege.prompt("Slow to accept")
    peer.behave(commit_delay_s=1.0)
    began_s = time.monotonic()
    _, committed = siege.prefill(peer.ticket(siege.running.info("prefill-0"), prompt, range(7)), prompt)
    took_us = (time.monotonic() - began_s) * 1e6
    assert 0 < committed.transfer.busy_us < 1_000_000 <= committed.transfer.exposed_us
    assert committed.transfer.exposed_us + committed.prefill.compute_us <= took_us


CHANGES: dict[str, dict[str, Any]] = {
    "expired": {"expires_in_ms": 0},
    "outside the pool": {"blocks": [0, 1, 2, 3, 4, 5, 40]},
    "one block twice": {"blocks": [0, 1, 2, 3, 4, 5, 5]},
    "too few blocks": {"blocks": range(6)},
    "another writer": {"writer_id": "prefill-9"},
    "an earlier writer": {"writer_incarnation": 1},
    "another prompt": {"num_prompt_tokens": 99},
    "no blocks before": {"first_block_index": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_ticket_that_is_not_good_is_refused_before_a_byte_moves(siege: Siege, peer: Peer, change: str) -> None:
    prompt = siege.prompt("No good")
    ticket = peer.ticket(siege.running.info("prefill-0"), prompt, **{"blocks": range(7), **CHANGES[change]})
    before = peer.hashes(), siege.running.stats("prefill-0").num_bytes_written
    with pytest.raises(ConflictError):
        siege.prefill(ticket, prompt)
    assert (peer.hashes(), siege.running.stats("prefill-0").num_bytes_written) == before
    assert peer.heard("CommitTransfer") == []


def test_a_ticket_is_used_once_whatever_epoch_it_names(siege: Siege, peer: Peer) -> None:
    prompt = siege.prompt("Replayed")
    ticket = peer.ticket(siege.running.info("prefill-0"), prompt, range(7))
    siege.prefill(ticket, prompt)
    before = peer.hashes(), siege.running.stats("prefill-0").num_bytes_written
    for epoch in (ticket.epoch, ticket.epoch + 1):
        ticket.epoch = epoch
        with pytest.raises(ConflictError, match="was used or stopped before"):
            siege.prefill(ticket, prompt)
    assert (peer.hashes(), siege.running.stats("prefill-0").num_bytes_written) == before
    assert len(peer.heard("CommitTransfer")) == 1


def test_every_message_between_workers_names_both_incarnations(siege: Siege, peer: Peer) -> None:
    """And a message that names another is told apart, the first one already."""
    prompt, info = siege.prompt("Named"), siege.running.info("prefill-0")
    with siege.ask(prompt, peer.writer()) as asked:
        lent = asked.ticket
        names = ("owner_incarnation", "writer_incarnation")
        assert [getattr(lent, name) for name in names] == [siege.running.info("decode-0").incarnation, peer.incarnation]
        for name in names:
            for answer in (peer.commit(lent, range(7), **{name: 1}), peer.abort(lent, **{name: 1})):
                assert answer["error"] == "ConflictError"
        assert siege.blocks().lent == len(lent.blocks), "nothing has changed"
    siege.running.wait_until(lambda: bool(peer.heard("StopTransfer")), 5, "the writer is asked to stop")
    peer.behave(commit="refuse")
    ticket = peer.ticket(info, prompt, range(7))
    with pytest.raises(AbortedError):
        siege.prefill(ticket, prompt)
    siege.running.wait_until(lambda: bool(peer.heard("AbortTransfer")), 5, "the owner is told")
    both = (peer.incarnation, info.incarnation)
    for rpc, incarnations in (
        ("StopTransfer", (lent.owner_incarnation, peer.incarnation)),
        ("CommitTransfer", both),
        ("AbortTransfer", both),
    ):
        heard = peer.heard(rpc)
        assert [tuple(int(message[name]) for name in names) for message in heard] == [incarnations]


@pytest.mark.parametrize(
    "change", [{"owner_id": "decode-9"}, {"owner_incarnation": 1}, {"epoch": 9}, {"writer_id": "x"}]
)
def test_a_writer_stops_for_its_owner_only(siege: Siege, peer: Peer, change: dict[str, Any]) -> None:
    prompt = siege.prompt("Not yours to stop")
    peer.behave(commit_delay_s=1.0)
    ticket = peer.ticket(siege.running.info("prefill-0"), prompt, range(7))
    right: dict[str, Any] = {
        "transfer_id": ticket.transfer_id, "epoch": ticket.epoch, "owner_id": ticket.owner_id,
        "owner_incarnation": ticket.owner_incarnation, "writer_id": ticket.writer_id,
        "writer_incarnation": ticket.writer_incarnation,
    }  # fmt: skip
    with (
        siege.prefilling(ticket, prompt) as call,
        grpc.insecure_channel(siege.running.local.address("prefill-0")) as channel,
    ):
        next(call)
        with pytest.raises(grpc.RpcError) as refused:
            worker_pb2_grpc.WorkerServiceStub(channel).StopTransfer(
                worker_pb2.StopTransferRequest(**{**right, **change}), timeout=5
            )
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert next(call).HasField("committed"), "it was not stopped"
