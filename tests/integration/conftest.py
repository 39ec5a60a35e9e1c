"""Real processes, the real model: one cluster for the whole session, and what it is compared with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvferry import Client
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.cli.cluster import LocalCluster, Timing
from kvferry.cli.members import ClusterConfig, clone_root, plan
from tests.integration.reference import Reference

# Small chunks, so that prompts of a few hundred tokens take several; everything is shipped, however short and whatever that
# costs.  Which transfers are verified is left to chance by default; test_checksums.py has a cluster that verifies all.
ENVIRONMENT = {
    "KVFERRY_CHUNK_TOKENS": "64",
    "KVFERRY_ROUTING": "least-loaded",
    "KVFERRY_MIN_SHIP_TOKENS": "1",
    "KVFERRY_VERIFY_TRANSFERS": "none",
    "OTEL_TRACES_EXPORTER": "console",  # into the members' logs: test_traces.py
}
SETTLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster that is up, and ways to ask it."""

    local: LocalCluster

    @property
    def address(self) -> str:
        return self.local.grpc_address

    @property
    def http_url(self) -> str:
        return self.local.http_url

    def stats(self, name: str) -> worker_pb2.GetStatsResponse:
        with grpc.insecure_channel(self.local.address(name)) as channel:
            return worker_pb2_grpc.WorkerServiceStub(channel).GetStats(worker_pb2.GetStatsRequest(), timeout=10)

    def info(self, name: str) -> directory_pb2.WorkerInfo:
        return self.stats(name).state.info

    def cluster_view(self) -> inference_pb2.DescribeClusterResponse:
        with grpc.insecure_channel(self.address) as channel:
            stub = inference_pb2_grpc.ClusterServiceStub(channel)
            return stub.DescribeCluster(inference_pb2.DescribeClusterRequest(), timeout=10)

    def wait_until(self, holds: Callable[[], bool], within_s: float, what: str) -> float:
        """Seconds it took."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < within_s, f"not within {within_s} s: {what}"
            time.sleep(0.02)
        return time.monotonic() - began

    def is_quiet(self, name: str) -> bool:
        stats = self.stats(name)
        assert stats.integrity_ok, f"{name}: the block accounts do not add up"
        load = stats.state.load
        counts = load.blocks
        assert counts.free + counts.active + counts.cached + counts.lent + counts.quarantined == counts.total
        return not (counts.active or counts.lent or counts.quarantined or load.num_running or load.num_waiting)

    def assert_settles(self, within_s: float = SETTLE_S) -> None:
        """Every worker has given everything back: free = total - cached."""
        for name in ("prefill-0", "decode-0"):
            self.wait_until(lambda name=name: self.is_quiet(name), within_s, f"{name} is quiet")  # type: ignore[misc]

    def wait_routable(self, prefill_incarnation: int | None = None) -> None:
        """The gateway sees both workers (and this very prefill worker)."""

        def seen() -> bool:
            workers = {w.info.worker_id: w.info.incarnation for w in self.cluster_view().workers}
            return "decode-0" in workers and (
                workers.get("prefill-0") == prefill_incarnation if prefill_incarnation else "prefill-0" in workers
            )

        self.wait_until(seen, 30, "the gateway sees the workers")


@contextmanager
def started(log_dir: Path, environment: Mapping[str, str] = ENVIRONMENT, *, timing: Timing | None = None,
            **settings: Any) -> Iterator[Running]:  # fmt: skip
    """A cluster of a config's settings; those of ``environment`` outlive a restart of a member."""
    config = ClusterConfig(
        **{"grpc_port": 0, "http_port": 0, "threads": 1, "kv_memory": "512MiB", "dtype": "float32", **settings}
    )
    planned = plan(config, clone_root())
    members = [replace(m, environment={**m.environment, **environment}) for m in planned.members]
    local = LocalCluster(
        members, log_dir, grpc_address=planned.grpc_address, http_url=planned.http_url, timing=timing
    )  # fmt: skip
    local.start()
    try:
        yield Running(local)
    finally:
        local.stop()


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with started(Path(os.environ.get("KVFERRY_TEST_LOGS") or tmp_path_factory.mktemp("logs"))) as running:
        yield running


@pytest.fixture
def cluster(running: Running) -> Iterator[Running]:
    """The cluster, with both workers there before the test and everything given back after it."""
    running.wait_routable()
    yield running
    running.wait_routable()
    running.assert_settles(10.0)


@pytest.fixture
def client(cluster: Running) -> Iterator[Client]:
    with Client(cluster.address) as client:
        yield client


@pytest.fixture(scope="session")
def greedy(reference: Any) -> Reference:
    return Reference(reference)
