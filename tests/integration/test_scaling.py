"""A cluster gets smaller and larger under load: no request fails, and no answer is another one for it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvferry import Client
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.crew import Crew
from kvferry.cli.members import ClusterConfig, Role, clone_root, plan
from kvferry.types import WorkerRole
from tests.integration.conftest import Running

PROMPTS = [f"Number {n}. " + "The ferry left the harbour in the fog. " * (3 + 2 * n) for n in range(3)]
PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE


def test_workers_leave_and_come_under_load_and_no_answer_is_another_for_it(tmp_path: Path) -> None:
    planned = plan(
        ClusterConfig(grpc_port=0, http_port=0, num_decode=2, threads=1, dtype="float32", kv_memory="128MiB"),
        clone_root(),
    )
    assert planned.make_worker is not None
    cluster = LocalCluster(planned.members, tmp_path, grpc_address=planned.grpc_address, http_url=planned.http_url)
    crew, over = Crew(cluster, planned.make_worker), threading.Event()
    with cluster, Client(planned.grpc_address) as client, ThreadPoolExecutor(3) as threads:
        running = Running(cluster)
        running.wait_routable()

        def ask(prompt: str) -> tuple[list[int], str]:
            stream = client.generate(prompt, max_tokens=32, temperature=0, ignore_eos=True, timeout=60)
            answer = stream.result()
            return answer.token_ids, answer.timeline.decode_worker

        def workers(role: Role) -> set[str]:
            return {m.name for m in cluster.members if m.role is role}

        def seen() -> set[str]:
            return {w.info.worker_id for w in running.cluster_view().workers}

        undisturbed = [ask(prompt)[0] for prompt in PROMPTS]

        def go_on_asking(number: int) -> list[str]:
            places = []
            while not over.is_set():
                tokens, place = ask(PROMPTS[number])
                assert tokens == undisturbed[number]
                places.append(place)
            return places

        asking = [threads.submit(go_on_asking, number) for number in range(3)]
        try:
            running.wait_until(lambda: {"decode-0", "decode-1"} <= seen(), 30, "the gateway sees both")
            assert crew.scale({DECODE: 1}) == {PREFILL: 1, DECODE: 1}
            running.wait_until(lambda: len(workers(Role.DECODE)) == 1, 60, "one has finished and left")
            (stays,) = workers(Role.DECODE)
            assert crew.scale({DECODE: 2}) == {PREFILL: 1, DECODE: 2}
            (comes,) = workers(Role.DECODE) - {stays}
            running.wait_until(lambda: comes in seen(), 90, "one more has come")
        finally:
            over.set()
        assert all(future.result(60) for future in asking)
        assert all(running.stats(name).integrity_ok for name in ("prefill-0", stays, comes))
