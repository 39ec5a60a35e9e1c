"""A cluster whose members are on hosts of their own, with a network in between that a test cuts."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from kvferry import Client, Completion
from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import DEFAULT_MODEL, Member, Role, clone_root
from tests.namespaces import CannotPartition, Network

HOSTS = ("redis", "directory-0", "directory-1", "prefill-0", "decode-0", "decode-1", "gateway")
DEADLINE_S = 90.0
LEASE_S = 6.0
_PORT = 7000
_ENVIRONMENT = {
    "KVFERRY_INSECURE": "on",
    "KVFERRY_CHUNK_TOKENS": "64",
    "KVFERRY_ROUTING": "least-loaded",
    "KVFERRY_MIN_SHIP_TOKENS": "1",
    "KVFERRY_KV_MEMORY": "48MiB",
    "UCX_TLS": "tcp,self",  # the pools as between hosts
    "PYTHONUNBUFFERED": "1",
    "LC_ALL": "C",
}


@dataclass(frozen=True, slots=True)
class World:
    network: Network
    local: LocalCluster
    client: Client

    def ask(self, prompt: str, max_tokens: int = 24, **wanted: object) -> Completion:
        return self.client.generate(
            prompt,
            max_tokens=max_tokens,
            temperature=0,
            ignore_eos=True,
            timeout=DEADLINE_S,
            **wanted,  # type: ignore[arg-type]
        ).result()

    def stats(self, name: str) -> worker_pb2.GetStatsResponse:
        with grpc.insecure_channel(self.local.address(name)) as channel:
            return worker_pb2_grpc.WorkerServiceStub(channel).GetStats(worker_pb2.GetStatsRequest(), timeout=10)

    def view(self) -> inference_pb2.DescribeClusterResponse:
        with grpc.insecure_channel(self.local.address("gateway")) as channel:
            stub = inference_pb2_grpc.ClusterServiceStub(channel)
            return stub.DescribeCluster(inference_pb2.DescribeClusterRequest(), timeout=10)

    def known(self) -> dict[str, int]:
        """The incarnations that the gateway knows, by worker."""
        return {w.info.worker_id: w.info.incarnation for w in self.view().workers}

    def wait_until(self, holds: Callable[[], bool], within_s: float, what: str) -> float:
        """Seconds it took."""
        began_s = time.monotonic()
        while not holds():
            assert time.monotonic() - began_s < within_s, f"not within {within_s} s: {what}"
            time.sleep(0.05)
        return time.monotonic() - began_s

    def is_quiet(self, *names: str) -> bool:
        for name in names:
            stats = self.stats(name)
            assert stats.integrity_ok, f"{name}: the block accounts do not add up"
            load = stats.state.load
            blocks = load.blocks
            assert blocks.free + blocks.active + blocks.cached + blocks.lent + blocks.quarantined == blocks.total
            if blocks.active or blocks.lent or blocks.quarantined or load.num_running or load.num_waiting:
                return False
        return True

    def is_whole(self) -> bool:
        return set(self.known()) == {"prefill-0", "decode-0", "decode-1"} and self.view().view_age_ms < 3_000


@contextmanager
def a_world(log_dir: Path) -> Iterator[World]:
    """Skips where there can be none."""
    redis = shutil.which("redis-server") or shutil.which("valkey-server")
    if redis is None:
        pytest.skip("neither redis-server nor valkey-server is installed; apt-get install redis-server")
    try:
        with Network(HOSTS) as network:
            local = LocalCluster(_members(network, redis, log_dir), log_dir, grpc_address="", http_url="")
            local.start()
            try:
                with Client(local.address("gateway"), max_attempts=1) as client:
                    yield World(network, local, client)
            finally:
                network.heal()
                local.stop()
    except CannotPartition as why:
        pytest.skip(f"nothing can be partitioned here: {why}")


def _members(network: Network, redis: str, log_dir: Path) -> list[Member]:
    def at(host: str) -> str:
        return f"{network.address(host)}:{_PORT}"

    def member(name: str, role: Role, *command: str) -> Member:
        whole = (sys.executable, "-m", *command, "--listen", at(name))
        return Member(name, role, network.command(name, whole), at(name), cwd=clone_root(), environment=_ENVIRONMENT)

    directories = ("--directory", f"{at('directory-0')},{at('directory-1')}")
    store = ("services.directory", "--store", f"redis://{at('redis')}/0")
    model = ("--model", DEFAULT_MODEL, *directories)
    redis_command = (
        redis, "--bind", network.address("redis"), "--port", str(_PORT), "--protected-mode", "no", "--save", "",
        "--appendonly", "no", "--dir", str(log_dir),
    )  # fmt: skip
    return [
        Member("redis", Role.DIRECTORY, network.command("redis", redis_command), environment=_ENVIRONMENT),
        member("directory-0", Role.DIRECTORY, *store),
        member("directory-1", Role.DIRECTORY, *store),
        *(
            member(name, role, f"services.{role.value}", "--worker-id", name, *model)
            for name, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE), ("decode-1", Role.DECODE))
        ),
        member(
            "gateway", Role.GATEWAY, "gateway", *model, "--http-listen", f"{network.address('gateway')}:{_PORT + 1}"
        ),
    ]
