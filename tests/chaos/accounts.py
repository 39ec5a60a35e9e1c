"""What a cluster holds once it is quiet: blocks, descriptors, mapped memory, processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import grpc

from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import Role

QUIET_WITHIN_S = 40.0
# Connections to peers come and go; a leak of one a request, or of one a fault, is more.
MORE_DESCRIPTORS = 24
# A mapped pool of a process that has ended is let go of when its successor's is opened.
MAPPED_OF_ENDED = 4
_CALL_TIMEOUT_S = 5.0
_WORKERS = (Role.PREFILL, Role.DECODE)


class Accounts:
    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._workers = [m.name for m in cluster.members if m.role in _WORKERS]
        self._gateways = [m.name for m in cluster.members if m.role is Role.GATEWAY]

    def all_there(self) -> bool:
        """Whether every gateway knows exactly the worker processes that run now."""
        running = {}
        for name in self._workers:
            stats = self._stats(name)
            if stats is None or stats.state.load.draining:
                return False
            running[name] = stats.state.info.incarnation
        views = [self._view(name) for name in self._gateways]
        return all(
            view is not None
            and {w.info.worker_id: w.info.incarnation for w in view.workers} == running
            and not any(w.load.draining for w in view.workers)
            for view in views
        )

    def is_known(self, name: str) -> bool:
        """Whether a gateway knows the worker process of that name that runs now: then it has had a lease."""
        stats = self._stats(name)
        if stats is None:
            return False
        incarnation = stats.state.info.incarnation
        views = (self._view(gateway) for gateway in self._gateways)
        return any(w.info.incarnation == incarnation for view in views if view is not None for w in view.workers)

    def await_quiet(self) -> list[str]:
        """What is not given back in time, and accounts that do not add up; empty when all is well."""
        end_s = time.monotonic() + QUIET_WITHIN_S
        while (held := self._held()) and time.monotonic() < end_s:
            time.sleep(0.2)
        return held

    def descriptors(self) -> dict[str, int]:
        """Open ones of each member."""
        return {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in self.pids().items()}

    def mapped_of_ended(self) -> dict[str, int]:
        """For each member, how many memory segments it maps that no member has open: those of ended processes."""
        owned = set()
        for pid in self.pids().values():
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if os.readlink(descriptor).startswith("/memfd:kvferry"):
                        owned.add(descriptor.stat().st_ino)
        return {name: len(_mapped(pid) - owned) for name, pid in self.pids().items()}

    def leaks(self, before: dict[str, int]) -> list[str]:
        found = [
            f"{name} has {now} descriptors open, {before[name]} before"
            for name, now in self.descriptors().items()
            if now > before[name] + MORE_DESCRIPTORS
        ]
        found += [
            f"{name} maps {count} segments of ended processes"
            for name, count in self.mapped_of_ended().items()
            if count > MAPPED_OF_ENDED
        ]
        return found

    def _held(self) -> list[str]:
        held = []
        for name in self._workers:
            stats = self._stats(name)
            if stats is None:
                held.append(f"{name} does not answer")
                continue
            load, blocks = stats.state.load, stats.state.load.blocks
            if not stats.integrity_ok:
                held.append(f"{name}: the block accounts do not add up")
            if blocks.free + blocks.active + blocks.cached + blocks.lent + blocks.quarantined != blocks.total:
                held.append(f"{name}: blocks are missing: {blocks}")
            if (
                blocks.active
                or blocks.lent
                or blocks.quarantined
                or load.num_running
                or load.num_waiting
                or load.num_pins
            ):
                held.append(
                    f"{name} holds {blocks.active} active, {blocks.lent} lent and {blocks.quarantined} quarantined blocks, "
                    f"{load.num_running} running and {load.num_waiting} waiting requests, {load.num_pins} pins"
                )
        for name in self._gateways:
            view = self._view(name)
            if view is None or view.num_requests_in_flight:
                held.append(f"{name} has {'no answer' if view is None else view.num_requests_in_flight} in flight")
        return held

    def pids(self) -> dict[str, int]:
        """Of each member that runs."""
        return {m.name: pid for m in self._cluster.members if (pid := self._cluster.pid(m.name)) is not None}

    def _stats(self, name: str) -> worker_pb2.GetStatsResponse | None:
        with grpc.insecure_channel(self._cluster.address(name)) as channel, suppress(grpc.RpcError):
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            return stub.GetStats(worker_pb2.GetStatsRequest(), timeout=_CALL_TIMEOUT_S)
        return None

    def _view(self, name: str) -> inference_pb2.DescribeClusterResponse | None:
        with grpc.insecure_channel(self._cluster.address(name)) as channel, suppress(grpc.RpcError):
            stub = inference_pb2_grpc.ClusterServiceStub(channel)
            return stub.DescribeCluster(inference_pb2.DescribeClusterRequest(), timeout=_CALL_TIMEOUT_S)
        return None


def still_running(sessions: Iterable[int]) -> list[str]:
    """Processes of these sessions, which each member leads one of."""
    wanted, found = set(sessions), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) in wanted and state != "Z":
                    found.append(f"process {entry.name} is still there")
    return found


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def _mapped(pid: int) -> set[int]:
    found = set()
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/memfd:kvferry"):
                found.add(int(fields[4]))
    return found
