"""Classes of fault that others have met in the field, by a hostile writer: the answer is right or a typed error, and no
block is lost."""

from __future__ import annotations

import time

import pytest

from kvferry.errors import AbortedError, ConflictError
from tests.integration.hostile.peer import Peer
from tests.integration.hostile.siege import TICKET_LIFETIME_S, Siege
from tests.integration.reference import Reference

PATHS = ("mapped",)


def test_stale_reference(siege: Siege, peer: Peer, greedy: Reference) -> None:
    """Blocks have a new owner while somebody still holds a reference to them: it is worth nothing."""
    prompt, other = siege.prompt("Stale"), siege.prompt("Fresh", 80)
    slots, first_token = siege.learn(peer, prompt)
    with siege.ask(prompt, peer.writer()) as asked:
        stale = asked.ticket
        assert peer.write(stale, slots) == ""
    siege.wait_for("decode-0", 5, "the blocks are back", lent=0, quarantined=0)
    writer = siege.prefill_writer()
    with siege.all_taken_but(len(stale.blocks), writer), siege.ask(other, writer) as fresh:
        assert set(fresh.ticket.blocks) < set(stale.blocks)
        refused = [
            peer.commit(stale, slots, first_token),
            peer.commit(stale, slots, first_token, epoch=fresh.ticket.epoch),
            peer.commit(fresh.ticket, slots[:5], first_token, block_digests=[0] * 5),
            peer.abort(fresh.ticket),
        ]
        assert {answer["error"] for answer in refused} == {"ConflictError"}
        assert [" ".join(answer["message"].split()[2:5]) for answer in refused] == [
            "was given up", f"has epoch {stale.epoch},", "was lent to", "was lent to",
        ]  # fmt: skip
        siege.prefill(fresh.ticket, other)
        assert greedy.continuation_is_greedy(other, fresh.tokens())


def test_abort_after_registration(siege: Siege, peer: Peer, greedy: Reference) -> None:
    """The request ends before its writer has heard of it; its blocks are another's when the writer does."""
    prompt, other = siege.prompt("Too late"), siege.prompt("In time", 80)
    slots, first_token = siege.learn(peer, other)
    with siege.ask(prompt, siege.prefill_writer()) as aborted:
        pass
    siege.wait_for("decode-0", 5, "the blocks are back", lent=0, quarantined=0)
    with siege.all_taken_but(len(aborted.ticket.blocks), peer.writer()), siege.ask(other, peer.writer()) as asked:
        assert set(asked.ticket.blocks) < set(aborted.ticket.blocks)
        assert peer.write(asked.ticket, slots) == ""
        before = siege.hashes(asked.ticket.region, aborted.ticket.blocks)
        with pytest.raises(ConflictError, match="was used or stopped before"):
            siege.prefill(aborted.ticket, prompt)
        assert siege.hashes(asked.ticket.region, aborted.ticket.blocks) == before
        for _ in range(2):  # repeated, it changes nothing
            assert peer.commit(asked.ticket, slots, first_token)["error"] == ""
        assert greedy.continuation_is_greedy(other, asked.tokens())


def test_one_of_several(siege: Siege, peer: Peer) -> None:
    """The first of two batches decides the transfer while the other is still being written: the blocks wait for it."""
    prompt = siege.prompt("Two batches")
    peer.behave(stop="silent")
    with siege.ask(prompt, peer.writer()) as asked:
        blocks = asked.ticket.blocks
        peer.write_on(asked.ticket, range(3), blocks[:3])
        peer.write_on(asked.ticket, range(3, 7), blocks[3:])
        answer = peer.commit(asked.ticket, range(7), num_blocks=3)
        assert answer["error"] == "ConflictError"
        assert "its writer says that it wrote 100 tokens in 3 blocks" in answer["message"]
        with pytest.raises(AbortedError, match="in 3 blocks"):
            asked.tokens()
    siege.holds_for("decode-0", 0.5, lent=0, quarantined=len(blocks))
    with siege.ask(prompt, siege.prefill_writer()) as other:
        assert not set(other.ticket.blocks) & set(blocks)
    peer.behave(stop="honest")
    siege.wait_for("decode-0", 2, "both batches have ended", quarantined=0)
    still = siege.hashes(asked.ticket.region, blocks)
    time.sleep(0.1)
    assert siege.hashes(asked.ticket.region, blocks) == still


@pytest.mark.parametrize("believes", ["its blocks are where they belong", "they are the beginning"])
def test_misaligned_prefix(siege: Siege, peer: Peer, greedy: Reference, believes: str) -> None:
    """The owner has a prefix already, and the writer's prefix goes where the rest belongs."""
    prompt = siege.prompt("Aligned")
    slots, first_token = siege.learn(peer, prompt)
    salt = believes.encode()
    with siege.ask(prompt[:48], peer.writer(), salt, max_tokens=1) as asked:
        assert peer.write(asked.ticket, slots[:3]) == ""
        assert peer.commit(asked.ticket, slots[:3])["error"] == ""
        asked.tokens()
    with siege.ask(prompt, peer.writer(), salt) as asked:
        assert (asked.ticket.first_block_index, len(asked.ticket.blocks)) == (3, 4)
        wrong = slots[:4]
        assert peer.write(asked.ticket, wrong) == ""
        aligned = believes == "its blocks are where they belong"
        answer = peer.commit(
            asked.ticket, slots[3:] if aligned else wrong, first_token, indices=None if aligned else wrong
        )
        assert answer["reason"] == "CHECKSUM_MISMATCH"
        assert "block(s) 3, 4, 5, 6 of the prompt did not arrive" in answer["message"]
        with pytest.raises(AbortedError) as failed:
            asked.tokens()
        assert failed.value.reason == "CHECKSUM_MISMATCH"
    time.sleep(0.3)  # as long as the pair is in quarantine
    with siege.ask(prompt, peer.writer(), salt) as asked:
        assert peer.write(asked.ticket, slots[3:]) == ""
        assert peer.commit(asked.ticket, slots[3:], first_token)["error"] == ""
        assert greedy.continuation_is_greedy(prompt, asked.tokens())


@pytest.mark.parametrize("then", ["gives up", "says so", "says that it wrote all", "sends fewer digests"])
def test_incomplete_kv_accepted(siege: Siege, peer: Peer, then: str) -> None:
    """Half of the prompt's KV arrives."""
    prompt = siege.prompt("Half of it")
    slots, first_token = siege.learn(peer, prompt)
    half = slots[:3]
    with siege.ask(prompt, peer.writer()) as asked:
        ticket = asked.ticket
        assert peer.write(ticket, half, ticket.blocks[:3]) == ""
        match then:
            case "gives up":
                assert peer.abort(ticket)["error"] == ""
            case "says so":
                answer = peer.commit(ticket, slots, first_token, num_blocks=3, num_tokens=48)
                assert answer["reason"] == "TICKET_REFUSED"
            case "says that it wrote all":
                assert peer.commit(ticket, slots, first_token)["reason"] == "CHECKSUM_MISMATCH"
            case "sends fewer digests":
                assert peer.commit(ticket, half, first_token)["reason"] == "TICKET_REFUSED"
        with pytest.raises(AbortedError):
            asked.tokens()
    siege.wait_for("decode-0", 2, "the blocks are back", lent=0, quarantined=0)


def test_failure_not_told(siege: Siege, peer: Peer) -> None:
    """A writer that cannot go on says so, and the request ends then and not with its ticket; also where the writer could
    not even begin, and it is the gateway that says it."""
    prompt = siege.prompt("Told at once")
    with siege.ask(prompt, peer.writer()) as asked:
        began_s = time.monotonic()
        assert peer.abort(asked.ticket)["error"] == ""
        with pytest.raises(AbortedError, match="the writer gave up: it did not feel like it"):
            asked.tokens()
        assert time.monotonic() - began_s < TICKET_LIFETIME_S / 2
    with siege.ask(prompt, siege.prefill_writer()) as asked, pytest.raises(ConflictError, match="the prompt has 99"):
        siege.prefill(asked.ticket, prompt[:-1])
    siege.wait_for("decode-0", 2, "the blocks are back", lent=0, quarantined=0)


def test_blocks_never_freed(siege: Siege, peer: Peer) -> None:
    """The writer's last message names another transfer, and then it dies: the ticket's end ends the request."""
    prompt = siege.prompt("For ever")
    with siege.ask(prompt, peer.writer()) as asked:
        peer.write_on(asked.ticket, range(7))
        answer = peer.commit(asked.ticket, range(7), transfer_id="another")
        assert (answer["error"], answer["message"]) == ("ConflictError", "transfer another is not known here")
        peer.kill()
        with pytest.raises(AbortedError, match=f"did not commit within {TICKET_LIFETIME_S:g} s") as failed:
            asked.tokens()
        assert failed.value.reason == "TICKET_EXPIRED"
        siege.wait_for("decode-0", 2, "the blocks are back", lent=0, quarantined=0)


def test_restart_of_a_peer(siege: Siege, peer: Peer, greedy: Reference) -> None:
    """Another process takes a dead writer's name and address: it is not taken for the one before."""
    prompt = siege.prompt("Restarted")
    peer.behave(stop="silent")
    with siege.ask(prompt, peer.writer()) as asked:
        ticket = asked.ticket
        peer.write_on(ticket, range(7))
    siege.wait_for("decode-0", 2, "in quarantine", quarantined=len(ticket.blocks))
    peer.kill()
    with siege.peer(listen=peer.control_address) as successor:
        assert successor.control_address == peer.control_address
        siege.wait_for("decode-0", 10, "the blocks are back", lent=0, quarantined=0)
        slots, first_token = siege.learn(successor, prompt)
        with siege.ask(prompt, successor.writer()) as asked:
            assert successor.write(asked.ticket, slots) == ""
            for change, says in (
                ({"writer_incarnation": peer.incarnation}, f"not to hostile/{peer.incarnation}"),
                ({"owner_incarnation": 1}, "that process has ended"),
            ):
                answer = successor.commit(asked.ticket, slots, first_token, **change)
                assert answer["error"] == "ConflictError"
                assert says in answer["message"]
            assert "was given up" in successor.commit(ticket, slots, writer_incarnation=peer.incarnation)["message"]
            assert "was lent to" in successor.commit(ticket, slots)["message"]
            assert successor.commit(asked.ticket, slots, first_token)["error"] == ""
            assert greedy.continuation_is_greedy(prompt, asked.tokens())


def test_a_peers_crash_spreads(siege: Siege, peer: Peer, greedy: Reference) -> None:
    """A writer that has lost its mind commits a token that there is not: others who decode beside it do not notice."""
    prompt = siege.prompt("Mindless")
    slots, first_token = siege.learn(peer, prompt)
    with siege.ask(prompt, peer.writer(), max_tokens=60) as beside, siege.ask(prompt, peer.writer()) as asked:
        for request in (beside, asked):
            assert peer.write(request.ticket, slots) == ""
        assert peer.commit(beside.ticket, slots, first_token)["error"] == ""
        answer = peer.commit(asked.ticket, slots, first_token=2**31)
        tokens = beside.tokens()
        assert (answer["error"], asked.ticket.verify) == ("InvalidRequestError", True)
        assert greedy.continuation_is_greedy(prompt, tokens)
        assert len(tokens) == 60


def test_receiver_leaks_in_push_mode(siege: Siege, peer: Peer, greedy: Reference) -> None:
    """The request is aborted and its writer never says a word: its blocks wait, everything else goes on, and the end of
    its process ends the waiting."""
    prompt = siege.prompt("Silent")
    peer.behave(stop="silent")
    with siege.ask(prompt, peer.writer()) as silent:
        peer.write_on(silent.ticket, range(7))
    with siege.peer(worker_id="talkative") as other, siege.ask(prompt, other.writer()) as aborted:
        aborted.cancel()
        siege.wait_for(
            "decode-0", 2, "only the silent one is waited for", lent=0, quarantined=len(silent.ticket.blocks)
        )
    assert greedy.continuation_is_greedy(prompt, siege.answer(prompt))
    assert siege.blocks().quarantined == len(silent.ticket.blocks)
    peer.kill()
    siege.wait_for("decode-0", 10, "the blocks are back", quarantined=0)


def test_late_writer_reused_page(siege: Siege, peer: Peer) -> None:
    """The writer says that it has stopped and writes on, into blocks that have a new owner by then.  It is believed, and
    what it does is noticed as the new owner's KV is committed."""
    prompt = siege.prompt("Liar")
    peer.behave(stop="lie")
    peer.fill(range(7), 0x3F)
    with siege.ask(prompt, peer.writer()) as asked:
        late = asked.ticket
        peer.write_on(late, range(7))
    siege.wait_for("decode-0", 2, "the liar is believed", lent=0, quarantined=0)
    with siege.peer(worker_id="honest") as other:
        slots, first_token = siege.learn(other, prompt)
        with siege.all_taken_but(len(late.blocks), other.writer()), siege.ask(prompt[:80], other.writer()) as asked:
            reused = asked.ticket
            assert set(reused.blocks) < set(late.blocks)
            assert other.write(reused, slots[:5]) == ""
            time.sleep(0.1)
            answer = other.commit(reused, slots[:5], first_token)
            assert answer["reason"] == "CHECKSUM_MISMATCH"
            with pytest.raises(AbortedError) as failed:
                asked.tokens()
            assert failed.value.reason == "CHECKSUM_MISMATCH"
    peer.kill()


def test_timings_that_lie(siege: Siege, peer: Peer) -> None:
    """What the request waited for its KV counts as that, and not as compute."""
    prompt = siege.prompt("Half a second")
    slots, first_token = siege.learn(peer, prompt)
    began_s = time.monotonic()
    with siege.ask(prompt, peer.writer()) as asked:
        assert peer.write(asked.ticket, slots) == ""
        time.sleep(0.5)
        assert peer.commit(asked.ticket, slots, first_token)["error"] == ""
        asked.tokens()
        took_us = (time.monotonic() - began_s) * 1e6
        assert asked.finished is not None
        decode = asked.finished.decode
        assert decode.wait_for_kv_us >= 500_000
        assert decode.wait_for_kv_us + decode.compute_us <= took_us
