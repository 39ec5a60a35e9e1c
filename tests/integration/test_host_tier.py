"""Prompts that small pools have evicted come back from the hosts' memory, to both workers."""

from __future__ import annotations

import random
import urllib.request
from collections.abc import Iterator

import grpc
import pytest

from kvferry import Client
from kvferry.api.directory.v1 import directory_pb2, directory_pb2_grpc
from services.engine.hashing import chain_root, extend_chain
from tests.integration.conftest import ENVIRONMENT, Running, started

BLOCK = 16
BLOCK_NBYTES = 30 * 2 * BLOCK * 3 * 64 * 4
PROMPT_TOKENS = 408  # the last block is not full, so a prefill worker is asked even where all the others are cached
NUM_FULL = PROMPT_TOKENS // BLOCK
POOL_BLOCKS = 40
WORKERS = ("prefill-0", "decode-0")


@pytest.fixture(scope="module")
def tiered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    environment = {**ENVIRONMENT, "KVFERRY_HOST_KV_MEMORY": str(200 * BLOCK_NBYTES)}
    kv_memory = str(POOL_BLOCKS * BLOCK_NBYTES)
    with started(tmp_path_factory.mktemp("logs"), environment, kv_memory=kv_memory) as running:
        running.wait_routable()
        yield running
        running.assert_settles(10.0)


def prompt_of(seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 40_000), k=PROMPT_TOKENS)


def answer(client: Client, prompt: list[int]) -> list[int]:
    return list(client.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True).result().token_ids)


def lookup(tiered: Running, hashes: bytes) -> list[directory_pb2.PrefixMatch]:
    with grpc.insecure_channel(tiered.local.address("directory")) as channel:
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        return list(stub.Lookup(directory_pb2.LookupRequest(hashes=hashes), timeout=10).matches)


def test_an_evicted_prompt_is_copied_back_and_not_computed(tiered: Running) -> None:
    prompt = prompt_of(0)
    with Client(tiered.address) as client:
        first = answer(client, prompt)
        # Two more evict all of it from pools of 40 blocks, by and by, once it is saved.
        for seed in (1, 2):
            for name in WORKERS:
                tiered.wait_until(
                    lambda name=name, seed=seed: tiered.stats(name).num_host_blocks_saved >= seed * NUM_FULL,  # type: ignore[misc]
                    20, f"{name} has saved what it holds",
                )  # fmt: skip
            answer(client, prompt_of(seed))
        before = {name: tiered.stats(name) for name in WORKERS}
        assert {stats.num_host_blocks_lost for stats in before.values()} == {0}
        assert answer(client, prompt) == first
    after = {name: tiered.stats(name) for name in WORKERS}
    prefill, decode = ((before[name], after[name]) for name in WORKERS)
    assert prefill[1].num_prefill_tokens - prefill[0].num_prefill_tokens == PROMPT_TOKENS % BLOCK
    assert prefill[1].num_host_blocks_loaded - prefill[0].num_host_blocks_loaded == NUM_FULL
    assert decode[1].num_prefill_tokens == 0
    assert decode[1].num_host_blocks_loaded - decode[0].num_host_blocks_loaded == NUM_FULL
    assert decode[1].num_blocks_received - decode[0].num_blocks_received == 1
    for name in WORKERS:
        assert after[name].integrity_ok
        assert after[name].num_host_copies_failed == 0
        assert after[name].state.load.host_load_bytes_per_s > 0


def test_directory_and_metrics_know_of_the_host_tier(tiered: Running) -> None:
    with Client(tiered.address) as client:
        answer(client, prompt_of(3))
        tiered.wait_until(
            lambda: tiered.stats("decode-0").num_host_blocks_saved >= 4 * NUM_FULL, 20, "it is saved as well"
        )
        answer(client, prompt_of(4))
    revision = tiered.info("decode-0").model.revision
    hashes = b"".join(extend_chain(chain_root(revision), prompt_of(3), BLOCK))

    def on_host() -> bool:
        found = {m.worker_id: m for m in lookup(tiered, hashes)}
        match = found.get("decode-0", directory_pb2.PrefixMatch())
        return match.num_blocks == NUM_FULL and match.num_device_blocks < NUM_FULL

    tiered.wait_until(on_host, 10, "the directory knows what went to the host")
    load = tiered.stats("decode-0").state.load
    assert load.num_host_slots == 200
    (member,) = (m for m in tiered.local.members if m.name == "decode-0")
    assert member.metrics_url is not None
    with urllib.request.urlopen(member.metrics_url, timeout=10) as page:
        lines = str(page.read(), "utf-8").splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("kvferry_host"))
    assert float(values["kvferry_host_blocks"]) >= 4 * NUM_FULL
    loaded = float(values['kvferry_host_copied_blocks_total{direction="up"}'])
    assert loaded >= NUM_FULL
    assert float(values['kvferry_host_copied_bytes_total{direction="up"}']) == loaded * BLOCK_NBYTES
