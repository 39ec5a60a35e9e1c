"""What must hold however KV goes, by mapped memory and over tcp: whose word or death gives blocks back, and when."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

import grpc
import pytest

from kvferry import Client
from kvferry.errors import OverloadedError, UnavailableError, from_rpc_error
from tests.integration.hostile.peer import Peer
from tests.integration.hostile.siege import Siege
from tests.integration.reference import Reference
from tests.integration.test_checksums import metric

NOISE = 0x3F


def test_silent_slow_path(siege: Siege, greedy: Reference) -> None:
    """The answer is right either way; the log and a metric say which way it was."""
    paths = {path: f'kvferry_transport_bytes_total{{path="{path}"}}' for path in ("mapped", "rma")}
    before = {path: metric(siege.running, name, "prefill-0") for path, name in paths.items()}
    with Client(siege.running.address) as client:
        prompt = siege.prompt("Slow and silent")
        answer = client.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True).result()
    assert greedy.continuation_is_greedy(prompt, answer.token_ids)
    assert (answer.timeline.prefill_worker, answer.timeline.num_retries) == ("prefill-0", 0)
    transfer = answer.timeline.transfer
    assert transfer is not None
    assert transfer.path == siege.path
    moved = {path: metric(siege.running, name, "prefill-0") - before[path] for path, name in paths.items()}
    assert moved == {**dict.fromkeys(paths, 0), siege.path: transfer.num_bytes}
    logged = [json.loads(line) for line in siege.log("prefill-0").splitlines() if '"pool_not_mapped"' in line]
    slow = [(line["level"], line["why"]) for line in logged if line["owner"] == "decode-0"]
    why = "the owner's UCX_TLS allows no shared memory, or its pool is a GPU's"
    assert slow == ([("warning", why)] if siege.path == "rma" else [])


def take_all(siege: Siege, writer: Peer, requests: ExitStack) -> list[int]:
    """Asks for blocks until there are none; those that were lent have been written into."""
    taken: list[int] = []
    while True:
        try:
            asked = requests.enter_context(siege.ask(range(2000, 2100), writer.writer()))
        except OverloadedError:
            return taken
        assert writer.write(asked.ticket, range(7)) == ""
        taken += asked.ticket.blocks


def test_no_block_of_a_writer_that_hangs_goes_to_anybody(siege: Siege, peer: Peer, greedy: Reference) -> None:
    """Its request is cancelled, the question whether it has stopped is not answered, others need every block; then it goes
    on, and what it writes is seen in its own blocks and in no other."""
    prompt = siege.prompt("Hung")
    peer.fill(range(7), NOISE)
    peer.behave(stop="silent")
    with siege.ask(prompt, peer.writer()) as asked:
        lent, region = list(asked.ticket.blocks), asked.ticket.region
        peer.write_on(asked.ticket, range(7))
        noise = siege.hashes(region, lent)
        assert len(set(noise)) == 1
        peer.hang()
    with siege.peer(worker_id="bystander") as bystander, ExitStack() as others:
        answer = siege.answer(prompt)
        taken = take_all(siege, bystander, others)
        assert len(taken) > 35, "hardly a request got through"
        assert not set(taken) & set(lent)
        asked_in_vain = f'"transfer_id": "{asked.ticket.transfer_id}"'
        siege.running.wait_until(
            lambda: any(
                asked_in_vain in line and '"event": "quarantine"' in line for line in siege.log("decode-0").splitlines()
            ),
            10,
            "the writer was asked in vain",
        )
        siege.overwrite(region, lent, 0)
        assert siege.hashes(region, lent) != noise
        rest = [block for block in range(siege.blocks().total) if block not in lent]
        before = siege.hashes(region, rest)
        peer.go_on()
        siege.running.wait_until(lambda: siege.hashes(region, lent) == noise, 10, "it writes on")
        siege.holds_for("decode-0", 0.3, quarantined=len(lent))
        assert siege.hashes(region, rest) == before
        peer.behave(stop="honest")
        siege.wait_for("decode-0", 10, "it said that it has stopped", quarantined=0)
        siege.overwrite(region, lent, 0)
        still = siege.hashes(region, lent)
        time.sleep(0.2)
        assert siege.hashes(region, lent) == still != noise
        assert siege.hashes(region, rest) == before
        assert greedy.continuation_is_greedy(prompt, answer)


@pytest.mark.parametrize("when", ["while it writes", "while it hangs and is asked to stop"])
def test_blocks_of_a_killed_writer_come_back_at_once_and_no_byte_follows(siege: Siege, peer: Peer, when: str) -> None:
    prompt = siege.prompt("Killed")
    peer.fill(range(30), NOISE)
    with siege.ask(prompt * 4, peer.writer()) as asked:
        lent, region = list(asked.ticket.blocks), asked.ticket.region
        peer.write_on(asked.ticket, range(len(lent)))
        if when == "while it writes":
            peer.kill()
        else:
            peer.hang()
    if when == "while it hangs and is asked to stop":
        siege.holds_for("decode-0", 0.3, quarantined=len(lent))
        peer.kill()
    siege.wait_for("decode-0", 2, "the blocks are back", lent=0, quarantined=0)
    siege.overwrite(region, lent, 0)
    clean = siege.hashes(region, lent)
    assert len(set(clean)) == 1
    time.sleep(0.3)
    assert siege.hashes(region, lent) == clean


def test_the_writer_of_a_killed_owner_fails_at_once_and_serves_the_next(
    siege: Siege, peer: Peer, greedy: Reference
) -> None:
    prompt = siege.prompt("Owner killed", 256)
    ticket = peer.ticket(siege.running.info("prefill-0"), prompt, range(16))
    untouched = peer.hashes(range(1))
    with siege.prefilling(ticket, prompt) as call:
        siege.running.wait_until(lambda: peer.hashes(range(1)) != untouched, 30, "the first chunk is written")
        peer.kill()
        killed_s = time.monotonic()
        with pytest.raises(grpc.RpcError) as lost:
            list(call)
        assert time.monotonic() - killed_s < 2
    error = from_rpc_error(lost.value)
    assert (type(error), error.reason) == (UnavailableError, "OWNER_LOST")
    siege.wait_for("prefill-0", 2, "the source is given back", active=0)
    prompt = siege.prompt("After its owner was killed", 40)
    assert greedy.continuation_is_greedy(prompt, siege.answer(prompt))
