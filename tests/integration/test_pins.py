"""A worker's cached blocks, read by others under pins: one real worker with a small pool, real readers, no cluster."""

from __future__ import annotations

import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.cli import ports
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import Member, Role
from kvferry.errors import from_rpc_error
from services.engine.hashing import chain_root, extend_chain
from tests.decode_calls import BlockingDecodeCall
from tests.integration.reader import Pinned, ReaderProcess, digests
from transport import create

ROOT = Path(__file__).parents[2]
BLOCK = 16
BLOCK_NBYTES = 30 * 2 * BLOCK * 3 * 64 * 4
NUM_BLOCKS = 24  # of which 6 may be pinned
LIFETIME_S = 12.0


@dataclass(frozen=True, slots=True)
class Holder:
    local: LocalCluster
    stub: worker_pb2_grpc.WorkerServiceStub
    channel: grpc.Channel
    info: directory_pb2.WorkerInfo

    def load(self) -> directory_pb2.WorkerLoad:
        stats = self.stub.GetStats(worker_pb2.GetStatsRequest(), timeout=10)
        assert stats.integrity_ok
        return stats.state.load

    def answer(self, prompt: list[int], max_tokens: int) -> Iterator[str]:
        sampling = common_pb2.SamplingParams(
            max_tokens=max_tokens, temperature=0, top_p=1, top_k=0, seed=0, ignore_eos=True
        )
        request = worker_pb2.DecodeOpen(request_id="pins", prompt_token_ids=prompt, sampling=sampling)
        for event in BlockingDecodeCall(self.channel, request, 60):
            yield str(event.WhichOneof("event"))

    def serve(self, prompt: list[int]) -> bytes:
        """Answers a prompt with one token; the chain hashes of its full blocks, which are cached then."""
        assert list(self.answer(prompt, 1)) == ["token", "finished"]
        return b"".join(extend_chain(chain_root(self.info.model.revision), prompt, BLOCK))

    def fill(self, first_token: int) -> None:
        """Serves two prompts, each as long as there is room for beside the pins; nothing else stays cached."""
        for start in (first_token, first_token + 300):
            self.serve(list(range(start, start + 280)))

    def pin(self, hashes: bytes, **fields: Any) -> worker_pb2.PinBlocksResponse:
        known: dict[str, Any] = {"reader_id": "me", "reader_incarnation": 5, "owner_incarnation": self.info.incarnation}
        return self.stub.PinBlocks(worker_pb2.PinBlocksRequest(hashes=hashes, **(known | fields)), timeout=10)

    def release(self, pin_id: str, **fields: Any) -> bool:
        known: dict[str, Any] = {"reader_id": "me", "reader_incarnation": 5, "owner_incarnation": self.info.incarnation}
        return self.stub.ReleasePin(worker_pb2.ReleasePinRequest(pin_id=pin_id, **(known | fields)), timeout=10).held

    def blocks_held(self, hashes: bytes) -> list[int]:
        pinned = self.pin(hashes)
        assert not pinned.pin_id or self.release(pinned.pin_id)
        return list(pinned.blocks)

    def metrics(self) -> str:
        (member,) = self.local.members
        assert member.metrics_url is not None
        with urllib.request.urlopen(member.metrics_url, timeout=10) as answer:
            return str(answer.read(), "utf-8")


@pytest.fixture(scope="module")
def holder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Holder]:
    address, nobody, metrics_port = (ports.join(ports.LOOPBACK, port) for port in ports.pick_free(3, avoid=()))
    flags = {
        "--listen": address, "--directory": nobody, "--worker-id": "holder", "--threads": "1", "--dtype": "float32",
        "--kv-memory": str(NUM_BLOCKS * BLOCK_NBYTES), "--pin-lifetime-s": str(LIFETIME_S),
        "--metrics-port": metrics_port.rpartition(":")[2],
    }  # fmt: skip
    command = (sys.executable, "-m", "services.decode", *(part for flag in flags.items() for part in flag))
    member = Member("holder", Role.DECODE, command, address, f"http://{metrics_port}/metrics", cwd=ROOT)
    with (
        LocalCluster([member], tmp_path_factory.mktemp("logs"), restart=False) as local,
        grpc.insecure_channel(address) as channel,
    ):
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        info = stub.GetStats(worker_pb2.GetStatsRequest(), timeout=10).state.info
        yield Holder(local, stub, channel, info)


def lease_end_s(pinned: Pinned) -> float:
    return pinned.asked_s + pinned.expires_in_ms / 1000


def test_the_pin_of_a_killed_reader_ends_with_its_lease(holder: Holder) -> None:
    with ReaderProcess(holder.local.address("holder"), holder.info.incarnation, 1) as reader, create("ucx") as ours:
        holder.fill(2000)
        hashes = holder.serve(list(range(1000, 1081)))
        pinned = reader.pin(hashes)
        assert len(pinned.blocks) == 5
        assert 0 < pinned.expires_in_ms <= LIFETIME_S * 1000
        first = reader.read()
        load = holder.load()
        assert (load.num_pins, load.num_pinned_blocks, load.blocks.active) == (1, 5, 5)
        assert "kvferry_pins 1.0" in holder.metrics()
        assert "kvferry_pinned_blocks 5.0" in holder.metrics()

        holder.fill(4000)
        assert holder.blocks_held(hashes) == pinned.blocks
        assert reader.read() == first
        reader.kill()
        holder.fill(6000)
        assert holder.blocks_held(hashes) == pinned.blocks, "death alone proves nothing to the holder"
        descriptor = holder.pin(hashes[:16], lifetime_ms=1).region
        assert digests(ours, descriptor, pinned.blocks, BLOCK_NBYTES) == first
        assert time.monotonic() < lease_end_s(pinned), "the machine was too slow for this test to say anything"

        while holder.load().num_pins:
            assert time.monotonic() < lease_end_s(pinned) + 1, "the pin outlives its lease"
            time.sleep(0.02)
        assert time.monotonic() > pinned.asked_s + LIFETIME_S, "the pin ended before its lease"
        load = holder.load()
        assert (load.num_pinned_blocks, load.blocks.active) == (0, 0)
        assert not holder.release(pinned.pin_id, reader_id="reader", reader_incarnation=1)
        holder.fill(8000)
        assert holder.blocks_held(hashes) == []
        assert digests(ours, descriptor, pinned.blocks, BLOCK_NBYTES) != first


def test_messages_of_other_processes_change_nothing(holder: Holder) -> None:
    hashes = holder.serve(list(range(1000, 1081)))
    pinned = holder.pin(hashes, lifetime_ms=600_000)
    assert pinned.expires_in_ms <= LIFETIME_S * 1000
    assert pinned.owner_incarnation == holder.info.incarnation
    for call, reason in (
        (lambda: holder.pin(hashes, owner_incarnation=1), "OTHER_INCARNATION"),
        (lambda: holder.release(pinned.pin_id, owner_incarnation=1), "OTHER_INCARNATION"),
        (lambda: holder.pin(hashes, reader_incarnation=4), "PIN_REFUSED"),
        (lambda: holder.release(pinned.pin_id, reader_incarnation=4), "PIN_REFUSED"),
        (lambda: holder.release(pinned.pin_id, reader_id="another"), "PIN_REFUSED"),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert from_rpc_error(refused.value).reason == reason
    assert holder.load().num_pins == 1
    assert holder.pin(hashes[:16], reader_incarnation=6).pin_id
    assert holder.load().num_pinned_blocks == 1, "the newer process ended its predecessor's pin"
    assert not holder.release(pinned.pin_id)
    assert holder.load().num_pins == 1
    with pytest.raises(grpc.RpcError) as refused:
        holder.pin(hashes[:-1])
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_pins_over_their_share_are_refused(holder: Holder) -> None:
    one, other = holder.serve(list(range(1000, 1081))), holder.serve(list(range(3000, 3081)))
    pinned = holder.pin(one, reader_incarnation=7)
    with pytest.raises(grpc.RpcError) as refused:
        holder.pin(other, reader_incarnation=7)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = from_rpc_error(refused.value)
    assert error.reason == "TOO_MANY_PINS"
    assert error.retry_after_s
    assert holder.release(pinned.pin_id, reader_incarnation=7)
    assert holder.load().num_pins == 0


def test_a_worker_that_is_told_to_stop_waits_for_its_streams_and_pins(holder: Holder) -> None:
    hashes = holder.serve(list(range(1000, 1081)))
    pinned = holder.pin(hashes, reader_incarnation=8)
    stream = holder.answer([1, 2, 3], 40)
    assert next(stream) == "token"
    holder.local.kill("holder", signal.SIGTERM)
    while not holder.load().draining:
        time.sleep(0.02)
    with pytest.raises(grpc.RpcError) as refused:
        holder.pin(hashes, reader_incarnation=8)
    assert from_rpc_error(refused.value).reason == "DRAINING"
    assert list(stream) == ["token"] * 39 + ["finished"]
    time.sleep(0.3)
    assert holder.local.pid("holder") is not None
    assert holder.release(pinned.pin_id, reader_incarnation=8)
    released_s = time.monotonic()
    while holder.local.pid("holder") is not None:
        assert time.monotonic() < released_s + 5
        time.sleep(0.02)
