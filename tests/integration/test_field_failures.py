"""Faults that others have met in the field and that need no peer that means harm: see README's table."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from kvferry import Client
from tests import tracing
from tests.integration.conftest import Running
from tests.integration.reference import Reference

# Less than a chunk, and more bytes than are copied by whoever posts them.
SHORT = "Whoever asks may leave before the ferry does. " * 4
LONG = "Each of these sentences makes the prompt a little longer than before. " * 15
DEADLINE_S = 90.0
# Of a ticket's five minutes.
GIVEN_BACK_S = 5.0
# Of an answer that nobody waits for: by itself it would end much later than that.
LEFT_TOKENS = 1000
NUM_LEAVERS = 9


def ferry_thread(cluster: Running) -> int:
    pid = cluster.local.pid("prefill-0")
    assert pid is not None
    return tracing.thread_of(pid, "kvferry-ferry")


@contextmanager
def traced() -> Iterator[None]:
    try:
        yield
    except tracing.CannotTraceError as why:
        pytest.skip(str(why))


def assert_given_back(cluster: Running) -> None:
    """Long before any lease would have ended."""
    cluster.assert_settles(GIVEN_BACK_S)


def test_stranded_on_cancel(cluster: Running, client: Client, greedy: Reference) -> None:
    """The client leaves with the first token in hand, between the prefill's end and the first decode step: the last blocks
    are still on their way then, since what carries them stands still."""
    prompt = "stranded: " + SHORT
    with traced(), tracing.held(ferry_thread(cluster)):
        with client.generate(prompt, max_tokens=LEFT_TOKENS, temperature=0, ignore_eos=True) as stream:
            next(stream)
            assert cluster.stats("decode-0").state.load.blocks.lent > 0
        for name in ("prefill-0", "decode-0"):  # what a write may still be under way from or to is nobody's yet
            counts = cluster.stats(name).state.load.blocks
            assert counts.active + counts.lent + counts.quarantined > 0
    assert_given_back(cluster)
    answer = client.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True).result()
    assert greedy.continuation_is_greedy(client.tokenize(prompt), answer.token_ids)
    assert answer.timeline.num_retries == 0


def test_stranded_on_cancel_at_any_moment(cluster: Running, client: Client, greedy: Reference) -> None:
    """Of a request's life, sampled; what the leavers left in the caches answers as if they had stayed."""
    random_ = random.Random(7)
    prompts = [f"leaver {number}: " + SHORT * 2 for number in range(NUM_LEAVERS)]
    began_s = time.monotonic()
    stayed = client.generate("stays: " + SHORT * 2, max_tokens=8, temperature=0, ignore_eos=True).result()
    took_s = time.monotonic() - began_s
    assert stayed.timeline.prefill_worker == "prefill-0"

    def leave(prompt: str, after_s: float) -> None:
        stream = client.generate(prompt, max_tokens=LEFT_TOKENS, temperature=0, ignore_eos=True)
        time.sleep(after_s)
        stream.close()

    with ThreadPoolExecutor(3) as threads:
        moments = [random_.uniform(0.0, 2 * took_s) for _ in prompts]  # three at a time take longer
        list(threads.map(leave, prompts, moments))
    assert_given_back(cluster)
    for prompt in prompts[::4]:
        answer = client.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True).result()
        assert greedy.continuation_is_greedy(client.tokenize(prompt), answer.token_ids)


def test_progress_thread_crash(cluster: Running, client: Client, greedy: Reference) -> None:
    """The thread that moves KV ends in the middle of a prompt, and its process lives on: not for long, and nobody's answer
    is another one for it."""
    prompt = "the ferryman is gone: " + LONG
    before, pid = cluster.stats("prefill-0").num_prefill_tokens, cluster.local.pid("prefill-0")
    with traced(), tracing.held(ferry_thread(cluster)) as thread:
        stream = client.generate(prompt, max_tokens=16, temperature=0, ignore_eos=True, timeout=DEADLINE_S)
        cluster.wait_until(
            lambda: cluster.stats("prefill-0").num_prefill_tokens > before, 30, "the first chunk is computed"
        )
        thread.end()
    cluster.wait_until(lambda: cluster.local.pid("prefill-0") not in (None, pid), 15, "another was started")
    assert "the transport's thread has ended" in (cluster.local.log_dir / "prefill-0.log").read_text()
    answer = stream.result()
    assert answer.timeline.num_retries >= 1
    assert greedy.continuation_is_greedy(client.tokenize(prompt), answer.token_ids)
    cluster.wait_until(lambda: cluster.is_quiet("decode-0"), 10, "the dead writer's blocks are back")
    cluster.local.wait_ready("prefill-0", 60)
    cluster.wait_routable(cluster.info("prefill-0").incarnation)
    again = client.generate("another ferryman: " + SHORT, max_tokens=4, temperature=0).result()
    assert (again.timeline.prefill_worker, again.timeline.num_retries) == ("prefill-0", 0)
