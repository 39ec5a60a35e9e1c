"""Processes that die in the middle: an answer that is right or an error that says what happened, never a hang."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvferry import Client, Completion, UnavailableError
from services.runtime.server import LIVE
from tests.integration.conftest import Running
from tests.integration.reference import Reference

LONG = "Each of these sentences makes the prompt a little longer than before. " * 60
DEADLINE_S = 90.0


def assert_serves(client: Client) -> None:
    answer = client.generate("And now?", max_tokens=4, temperature=0, ignore_eos=True, timeout=DEADLINE_S).result()
    assert len(answer.token_ids) == 4


def test_a_prefill_worker_killed_while_it_prefills(cluster: Running, client: Client, greedy: Reference) -> None:
    prompt = "killed while prefilling: " + LONG
    before = cluster.stats("prefill-0")
    stream = client.generate(prompt, max_tokens=16, temperature=0, ignore_eos=True, timeout=DEADLINE_S)
    cluster.wait_until(
        lambda: cluster.stats("prefill-0").num_blocks_written > before.num_blocks_written, 30, "blocks are written"
    )
    cluster.local.kill("prefill-0")
    answer = stream.result()  # the decode worker computes the prompt itself, or the restarted one does
    assert answer.timeline.num_retries >= 1
    assert greedy.continuation_is_greedy(client.tokenize(prompt), answer.token_ids)
    cluster.wait_until(lambda: cluster.is_quiet("decode-0"), 10, "the dead writer's blocks are back")
    cluster.local.wait_ready("prefill-0", 60)
    info = cluster.info("prefill-0")
    assert info.incarnation != before.state.info.incarnation
    cluster.wait_routable(info.incarnation)
    again = client.generate("after the restart: " + LONG[:300], max_tokens=4, temperature=0).result()
    assert again.timeline.prefill_worker == "prefill-0"
    assert again.timeline.num_retries == 0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_decode_worker_killed_while_it_decodes_is_a_pause(
    cluster: Running, client: Client, temperature: float
) -> None:
    """There is no other: the answer goes on where it was when the worker has been started again."""
    wanted = {"max_tokens": 100, "temperature": temperature, "seed": 11, "ignore_eos": True, "logprobs": 2}
    undisturbed = client.generate("Tell me everything.", **wanted).result()  # type: ignore[arg-type]
    with client.generate("Tell me everything.", timeout=DEADLINE_S, **wanted) as stream:  # type: ignore[arg-type]
        for _ in range(4):
            next(stream)
        cluster.local.kill("decode-0")
        answer = stream.result()
    assert answer.token_ids == undisturbed.token_ids
    assert answer.text == undisturbed.text
    assert [t.index for t in answer.tokens] == list(range(100))
    for ours, theirs in zip(answer.tokens, undisturbed.tokens, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=0.05)
    # Its old self may be asked again before the directory has dropped it.
    assert answer.timeline.num_retries >= 1
    assert answer.usage.num_prompt_tokens == undisturbed.usage.num_prompt_tokens
    assert answer.usage.num_output_tokens == 100
    assert answer.finish_reason == undisturbed.finish_reason
    cluster.local.wait_ready("decode-0", 60)
    cluster.wait_until(lambda: cluster.is_quiet("prefill-0"), 5, "the prefill worker holds nothing for the dead")
    assert_serves(client)


def test_a_decode_worker_killed_while_its_prompt_is_computed(
    cluster: Running, client: Client, greedy: Reference
) -> None:
    """An answer that has not begun is for the client to ask again; one that has, waits for the worker."""
    before = cluster.stats("prefill-0").num_blocks_written
    prompt = "owner killed: " + LONG
    with Client(cluster.address, max_attempts=1) as once:  # the default one would try again, and succeed
        stream = once.generate(prompt, max_tokens=4, temperature=0, ignore_eos=True, timeout=DEADLINE_S)
        cluster.wait_until(lambda: cluster.stats("prefill-0").num_blocks_written > before, 30, "blocks are written")
        cluster.local.kill("decode-0")
        outcome: Completion | UnavailableError
        try:
            outcome = stream.result()
        except UnavailableError as lost:
            outcome = lost
    if isinstance(outcome, UnavailableError):
        assert outcome.retry_after_s
    else:
        assert outcome.timeline.num_retries
        assert greedy.continuation_is_greedy(client.tokenize(prompt), outcome.token_ids)
    cluster.wait_until(lambda: cluster.is_quiet("prefill-0"), 5, "the writer has let go")
    cluster.local.wait_ready("decode-0", 60)
    cluster.local.wait_ready("gateway", 60)
    assert_serves(client)


def test_a_killed_gateway_leaves_nothing_behind(cluster: Running, client: Client) -> None:
    """One of its requests is decoded, the other's prompt is computed."""
    before = cluster.stats("prefill-0").num_blocks_written
    decoded = client.generate("For ever and ever.", max_tokens=500, temperature=0, ignore_eos=True, timeout=DEADLINE_S)
    next(decoded)
    prompt = "the gateway killed: " + LONG
    with ThreadPoolExecutor() as threads:
        computed = threads.submit(client.generate(prompt, max_tokens=4, timeout=DEADLINE_S).result)
        cluster.wait_until(lambda: cluster.stats("prefill-0").num_blocks_written > before + 1, 30, "blocks are written")
        cluster.local.kill("gateway")
        for name in ("decode-0", "prefill-0"):
            cluster.wait_until(lambda name=name: cluster.is_quiet(name), 6, f"{name} has what it gave")  # type: ignore[misc]
        with pytest.raises(UnavailableError):
            decoded.result()
        lost = computed.exception(DEADLINE_S)
        assert lost is None or isinstance(lost, UnavailableError)  # it asked again, and may have found nobody yet
    cluster.local.wait_ready("gateway", 60)
    assert_serves(client)


def test_while_the_directory_hangs_requests_go_on_and_the_view_says_its_age(cluster: Running, client: Client) -> None:
    """Longer than a lease, which is 6 s: those of workers that could not renew do not end by it."""
    incarnations = {w.info.worker_id: w.info.incarnation for w in cluster.cluster_view().workers}
    cluster.local.kill("directory", signal.SIGSTOP)
    began_s = time.monotonic()
    try:
        while time.monotonic() - began_s < 7.5:
            assert_serves(client)
        assert cluster.cluster_view().view_age_ms > 5_000
    finally:
        cluster.local.kill("directory", signal.SIGCONT)
    while cluster.cluster_view().view_age_ms > 2_500:
        assert_serves(client)
        assert time.monotonic() - began_s < 60, "the gateway does not watch again"
    assert {w.info.worker_id: w.info.incarnation for w in cluster.cluster_view().workers} == incarnations
    assert_serves(client)


def test_without_a_directory_the_cluster_goes_on(cluster: Running, client: Client) -> None:
    cluster.local.kill("directory")
    answer = client.generate("No directory, no problem: " + LONG[:400], max_tokens=8, temperature=0).result()
    assert answer.timeline.prefill_worker == "prefill-0"
    cluster.local.wait_ready("directory", 30)


def test_a_worker_is_drained_by_name_and_nobody_misses_it(cluster: Running, client: Client) -> None:
    def drain(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvferry.cli", "drain", name, "--address", cluster.address]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    with client.generate("On and on.", max_tokens=100, temperature=0, ignore_eos=True, timeout=DEADLINE_S) as stream:
        next(stream)
        done = drain("prefill-0")
        assert (done.returncode, done.stderr) == (
            0, "prefill-0 holds nothing for anybody any more; end it with SIGTERM\n",
        )  # fmt: skip
        assert len(stream.result().token_ids) == 100
    cluster.wait_until(lambda: any(w.load.draining for w in cluster.cluster_view().workers), 20, "it says so")
    assert _health(cluster, "prefill-0", "") == health_pb2.HealthCheckResponse.NOT_SERVING
    assert _health(cluster, "prefill-0", LIVE) == health_pb2.HealthCheckResponse.SERVING  # or it would be restarted
    assert client.generate("Alone: " + LONG[:300], max_tokens=2).result().timeline.prefill_worker == ""
    incarnation = cluster.info("prefill-0").incarnation
    cluster.local.kill("prefill-0", signal.SIGTERM)
    cluster.wait_until(lambda: _incarnation(cluster, "prefill-0") not in (0, incarnation), 60, "it is there again")
    cluster.local.wait_ready("prefill-0", 60)
    assert (
        drain("prefill-7").stderr == "kvferry: there is no worker prefill-7; the gateway knows: decode-0, prefill-0\n"
    )


def _health(cluster: Running, name: str, service: str) -> int:
    with grpc.insecure_channel(cluster.info(name).control_address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status)


def _incarnation(cluster: Running, name: str) -> int:
    return next((w.info.incarnation for w in cluster.cluster_view().workers if w.info.worker_id == name), 0)
