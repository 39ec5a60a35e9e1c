"""Workers change their roles under load: no request fails, and no answer is another one for it."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from kvferry import Client
from kvferry.api.common.v1 import common_pb2
from tests.integration.conftest import Running

PROMPTS = [f"Number {n}. " + "The ferry left the harbour in the fog. " * (4 + 3 * n) for n in range(3)]
PREFILL, DECODE = common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE
NEITHER_WAITS_LONG_S = 60.0


def change(cluster: Running, name: str, role: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvferry.cli", "role", name, role, "--address", cluster.address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_workers_change_roles_under_load_and_no_answer_is_another_for_it(cluster: Running, client: Client) -> None:
    def ask(prompt: str) -> tuple[list[int], str]:
        stream = client.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True, timeout=NEITHER_WAITS_LONG_S)
        answer = stream.result()
        return answer.token_ids, f"{answer.timeline.prefill_worker or '-'} {answer.timeline.decode_worker}"

    undisturbed = [ask(prompt)[0] for prompt in PROMPTS]
    over, numbers = threading.Event(), count()
    places: set[str] = set()

    def go_on_asking() -> int:
        num_asked = 0
        while not over.is_set():
            number = next(numbers) % len(PROMPTS)
            tokens, where = ask(PROMPTS[number])
            assert tokens == undisturbed[number]
            places.add(where)
            num_asked += 1
        return num_asked

    refused = change(cluster, "decode-0", "prefill")
    assert refused.stderr == "kvferry: decode-0 is the last decode worker, and without one no request is answered\n"
    incarnations = {name: cluster.info(name).incarnation for name in ("prefill-0", "decode-0")}
    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(go_on_asking) for _ in range(2)]
        try:
            for name, role in (
                ("prefill-0", "decode"), ("decode-0", "prefill"), ("decode-0", "decode"), ("prefill-0", "prefill"),
            ):  # fmt: skip
                done = change(cluster, name, role)
                assert (done.returncode, done.stderr) == (0, f"{name} is a {role} worker now\n")
                wanted = PREFILL if role == "prefill" else DECODE
                assert cluster.info(name).role == wanted
                cluster.wait_until(
                    lambda name=name, wanted=wanted: any(  # type: ignore[misc]
                        w.info.worker_id == name and w.info.role == wanted for w in cluster.cluster_view().workers
                    ),
                    20, "the gateway sees it",
                )  # fmt: skip
                ask(PROMPTS[0])
        finally:
            over.set()
        assert sum(future.result(NEITHER_WAITS_LONG_S) for future in asking) >= 4
    assert {"prefill-0 decode-0", "decode-0 prefill-0"} <= places
    for name, incarnation in incarnations.items():
        stats = cluster.stats(name)
        assert stats.integrity_ok
        assert stats.state.info.incarnation == incarnation
