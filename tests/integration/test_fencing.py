"""Slow is not dead: a worker that was stopped for longer than its lease ends its process, and comes back as another one."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvferry import Client, Completion
from tests.integration.conftest import Running

LEASE_S = 6.0
DEADLINE_S = 90.0
NUM_ASKED = 2


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_worker_stopped_for_longer_than_its_lease_fences_itself(cluster: Running, client: Client, name: str) -> None:
    """Under load: every answer is the undisturbed one, whatever the stopped process had begun; what others lent it and what
    it lent comes back."""
    before = cluster.stats(name)
    pid = cluster.local.pid(name)
    num_begun = threading.Semaphore(0)

    def ask(number: int) -> Completion:
        prompt = f"{name}, {number}: " + "tell me of the ferry, and of the river. " * 12
        with client.generate(
            prompt, max_tokens=32, temperature=0.8 * (number % 2), seed=number, ignore_eos=True, timeout=DEADLINE_S
        ) as stream:
            next(stream)
            num_begun.release()
            return stream.result()

    with ThreadPoolExecutor(NUM_ASKED) as threads:
        answers = [threads.submit(ask, number) for number in range(NUM_ASKED)]
        if name == "prefill-0":
            written = before.num_blocks_written
            cluster.wait_until(lambda: cluster.stats(name).num_blocks_written > written, 30, "it writes")
        else:  # there is no other: who has not begun is refused
            for _ in answers:
                assert num_begun.acquire(timeout=DEADLINE_S)
        cluster.local.kill(name, signal.SIGSTOP)
        time.sleep(LEASE_S + 1.0)
        assert cluster.local.pid(name) == pid
        cluster.local.kill(name, signal.SIGCONT)
        cluster.wait_until(lambda: cluster.local.pid(name) not in (None, pid), 10, "it ended, and another was started")
        disturbed = [answer.result() for answer in answers]
    assert any(answer.timeline.num_retries for answer in disturbed)
    cluster.local.wait_ready(name, 60)
    incarnation = cluster.info(name).incarnation
    assert incarnation > before.state.info.incarnation
    cluster.wait_until(
        lambda: incarnation in {w.info.incarnation for w in cluster.cluster_view().workers}, 20, "it is known"
    )
    cluster.assert_settles(10.0)
    undisturbed = [ask(number) for number in range(NUM_ASKED)]
    assert [answer.token_ids for answer in disturbed] == [answer.token_ids for answer in undisturbed]
    assert not any(answer.timeline.num_retries for answer in undisturbed)
