"""Blocks that arrive damaged are noticed before a token is decoded from them, and their pair is used no more."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest

from kvferry import Client
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterConfig, clone_root, plan
from kvferry.errors import AbortedError
from tests.integration.conftest import ENVIRONMENT, Running
from tests.integration.reference import Reference
from tests.integration.test_transfer import Handmade, overwrite_block

PROMPT = "Seven ships sailed north, and the eighth one turned around because its captain had forgotten his hat. " * 4


@pytest.fixture(scope="module")
def verifying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A cluster that verifies every transfer, and whose prefill worker can be asked to garble one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "KVFERRY_VERIFY_TRANSFERS": "all"}.items():
            patch.setenv(name, value)
        config = ClusterConfig(grpc_port=0, http_port=0, threads=1, kv_memory="512MiB", dtype="float32")
        planned = plan(config, clone_root())
        members = [
            replace(m, command=tuple("tests.integration.garbling" if w == "services.prefill" else w for w in m.command))
            for m in planned.members
        ]
        local = LocalCluster(
            members,
            tmp_path_factory.mktemp("logs"),
            grpc_address=planned.grpc_address,
            http_url=planned.http_url,
        )
        local.start()
    try:
        yield Running(local)
    finally:
        local.stop()


@pytest.fixture
def cluster(verifying: Running) -> Iterator[Running]:
    verifying.wait_routable()
    yield verifying
    verifying.assert_settles(10.0)


def metric(cluster: Running, name: str, of: str) -> float:
    (member,) = (m for m in cluster.local.members if m.name == of)
    assert member.metrics_url is not None
    with urllib.request.urlopen(member.metrics_url, timeout=10) as response:
        text = response.read().decode()
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


def checks(cluster: Running) -> tuple[float, float]:
    """(equal, mismatch)"""
    return (
        metric(cluster, 'kvferry_transfer_checks_total{result="ok"}', "decode-0"),
        metric(cluster, 'kvferry_transfer_checks_total{result="mismatch"}', "decode-0"),
    )


def restart_prefill(cluster: Running) -> None:
    """A quarantine ends with the process."""
    cluster.local.kill("prefill-0")
    cluster.local.wait_ready("prefill-0", 60)
    cluster.wait_routable(cluster.info("prefill-0").incarnation)


def test_every_transfer_is_verified_and_the_answers_are_right(
    cluster: Running, client: Client, greedy: Reference
) -> None:
    before = checks(cluster)
    digested = [metric(cluster, "kvferry_transfer_check_bytes_total", of) for of in ("prefill-0", "decode-0")]
    ids = list(client.tokenize(PROMPT))
    # Whole blocks and partial ones, one that fits a chunk; the last shares its beginning with what was sent before.
    prompts = [ids[:1], ids[1:17], ids[2:60], ids[3:], [*ids[3:51], *ids[:20]]]
    moved = 0
    for prompt in prompts:
        answer = client.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True).result()
        assert greedy.continuation_is_greedy(prompt, answer.token_ids)
        assert (answer.timeline.prefill_worker, answer.timeline.num_retries) == ("prefill-0", 0)
        transfer = answer.timeline.transfer
        assert transfer is not None
        assert 0 < transfer.verify_s <= transfer.exposed_s
        moved += transfer.num_bytes
    assert answer.timeline.decode is not None
    assert answer.timeline.decode.num_cached_tokens == 48
    assert checks(cluster) == (before[0] + len(prompts), before[1])
    for of, was in zip(("prefill-0", "decode-0"), digested, strict=True):
        assert metric(cluster, "kvferry_transfer_check_bytes_total", of) - was == moved
        assert metric(cluster, "kvferry_transfer_check_seconds_total", of) > 0


def test_a_garbled_transfer_costs_a_retry_and_never_the_answer(
    cluster: Running, client: Client, greedy: Reference
) -> None:
    before = checks(cluster)
    prompt = client.tokenize("Garbled. " + PROMPT)

    def answer(request_id: str) -> tuple[int, str]:
        """(retries, prefill worker)"""
        done = client.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True, request_id=request_id).result()
        assert greedy.continuation_is_greedy(prompt, done.token_ids)
        return done.timeline.num_retries, done.timeline.prefill_worker

    assert answer("garbled-1") == (1, "")
    assert checks(cluster) == (before[0], before[1] + 1)
    prompt = client.tokenize("After that. " + PROMPT)
    assert answer("honest") == (1, ""), "the pair is in quarantine"
    assert checks(cluster) == (before[0], before[1] + 1)
    restart_prefill(cluster)
    prompt = client.tokenize("And after the restart. " + PROMPT)
    assert answer("honest again") == (0, "prefill-0"), "another process starts clean"
    assert checks(cluster) == (before[0] + 1, before[1] + 1)


async def test_a_block_overwritten_before_the_commit_is_named_and_fails_the_transfer(
    cluster: Running, client: Client
) -> None:
    before = checks(cluster)
    prompt = list(client.tokenize(PROMPT))
    under_way = Handmade(cluster, prompt, b"under way")
    damaged = Handmade(cluster, prompt, b"damaged")
    async with under_way.begun() as (other_decode, _):
        await asyncio.wait_for(under_way.at_commit.wait(), 30)
        async with damaged.begun() as (decode, prefill):
            assert damaged.ticket.verify
            await asyncio.wait_for(damaged.at_commit.wait(), 30)
            await asyncio.to_thread(overwrite_block, damaged.ticket, 1)
            damaged.go_on.set()
            with pytest.raises(AbortedError, match=r"block\(s\) 1 of the prompt did not arrive as prefill-0") as failed:
                await decode.read()
            assert failed.value.reason == "CHECKSUM_MISMATCH"
            with pytest.raises(
                grpc.aio.AioRpcError, match=r"the commit was refused: transfer \w+: block\(s\) 1 "
            ) as refused:
                async for _ in prefill:
                    pass
            assert refused.value.code() is grpc.StatusCode.ABORTED
        with pytest.raises(AbortedError) as given_up:
            await other_decode.read()
        assert given_up.value.reason == "PAIR_QUARANTINED", "what the pair had under way ends with it"
    assert checks(cluster) == (before[0], before[1] + 1)
    with pytest.raises(AbortedError, match="takes no blocks from prefill-0") as quarantined:
        async with Handmade(cluster, prompt, b"next").begun():
            pytest.fail("a ticket was given")
    assert quarantined.value.reason == "PAIR_QUARANTINED"
    await asyncio.to_thread(restart_prefill, cluster)


@pytest.mark.parametrize("change", ["none", "too few", "too many"])
async def test_a_commit_that_brings_not_one_digest_per_block_is_refused(
    cluster: Running, client: Client, change: str
) -> None:
    handmade = Handmade(cluster, client.tokenize(PROMPT), b"digests")
    async with handmade.begun() as (decode, _), grpc.aio.insecure_channel(cluster.local.address("decode-0")) as channel:
        await asyncio.wait_for(handmade.at_commit.wait(), 30)
        ticket = handmade.ticket
        count = {"none": 0, "too few": len(ticket.blocks) - 1, "too many": len(ticket.blocks) + 1}[change]
        with pytest.raises(grpc.aio.AioRpcError, match=f"its writer sent {count}") as refused:
            await worker_pb2_grpc.DecodeServiceStub(channel).CommitTransfer(
                worker_pb2.CommitTransferRequest(
                    transfer_id=ticket.transfer_id, epoch=ticket.epoch, owner_incarnation=ticket.owner_incarnation,
                    writer_id=ticket.writer_id, writer_incarnation=ticket.writer_incarnation,
                    num_blocks=len(ticket.blocks), num_bytes=len(ticket.blocks) * ticket.layout.block_nbytes,
                    num_tokens=ticket.num_prompt_tokens, block_digests=[0] * count,
                ),
                timeout=10,
            )  # fmt: skip
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(AbortedError):
            await decode.read()
