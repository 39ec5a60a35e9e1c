"""How many workers of each role a local cluster keeps: more start, and of too many those with least to finish leave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from kvferry._roles import CertificateRole
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import Member, Role
from kvferry.cli.service_tls import open_service_channel
from kvferry.types import WorkerRole

_LOOK_TIMEOUT_S = 2.0
_ROLES = {common_pb2.WORKER_ROLE_PREFILL: Role.PREFILL, common_pb2.WORKER_ROLE_DECODE: Role.DECODE}
_NAMES = {WorkerRole.PREFILL: Role.PREFILL, WorkerRole.DECODE: Role.DECODE}


@dataclass(frozen=True, slots=True)
class _Hand:
    """A worker as it is now.  ``load`` is None where it cannot be asked, as while it starts."""

    member: Member
    role: Role
    load: directory_pb2.WorkerLoad | None

    @property
    def left(self) -> tuple[int, int]:
        """What it has to finish; nothing where it has not begun."""
        return (0, 0) if self.load is None else (
            self.load.num_running + self.load.num_waiting, self.load.num_queued_prefill_tokens
        )  # fmt: skip


class Crew:
    """Workers of ``cluster``.  ``make``: another one of a role, by number; ``drain_s`` bounds how long one that leaves may
    take to finish what it has.  Then it is told to end, and what it still answers goes on elsewhere (ADR 21)."""

    def __init__(self, cluster: LocalCluster, make: Callable[[Role, int], Member], *, drain_s: float = 600.0) -> None:
        self._cluster, self._make, self._drain_s = cluster, make, drain_s
        self._leaving: set[str] = set()  # names
        self._lock = threading.Lock()

    def scale(self, counts: Mapping[WorkerRole, int]) -> dict[WorkerRole, int]:
        """Brings roles to ``counts`` and says how many there are then of each: those that start count, those that leave do
        not.  Returns without waiting for either.  A worker that has changed its role counts where it is now."""
        with self._lock:
            hands = self._hands()
            for asked, count in counts.items():
                role = _NAMES[asked]
                there = [hand for hand in hands if hand.role is role]
                for _ in range(count - len(there)):
                    member = self._make(role, self._number(role))
                    self._cluster.add(member)
                    hands.append(_Hand(member, role, None))
                for hand in sorted(there, key=lambda hand: hand.left)[: max(0, len(there) - count)]:
                    self._send_off(hand.member)
                    hands.remove(hand)
            return {name: sum(hand.role is role for hand in hands) for name, role in _NAMES.items()}

    def _number(self, role: Role) -> int:
        """The first that nobody has, nor had whoever still leaves."""
        names = {member.name for member in self._cluster.members}
        return next(n for n in range(len(names) + 1) if f"{role.value}-{n}" not in names)

    def _hands(self) -> list[_Hand]:
        """Those that stay."""
        members = {m.name: m for m in self._cluster.members if m.role in (Role.PREFILL, Role.DECODE)}
        self._leaving &= members.keys()
        return [_look(member) for name, member in members.items() if name not in self._leaving]

    def _send_off(self, member: Member) -> None:
        def drain() -> None:
            try:
                with _channel(member) as channel:
                    stub = worker_pb2_grpc.WorkerServiceStub(channel)
                    stub.Drain(worker_pb2.DrainRequest(), timeout=self._drain_s)
            except grpc.RpcError:
                pass  # it ended meanwhile, or starts, or has had its time

        self._leaving.add(member.name)
        threading.Thread(
            target=self._cluster.retire, args=(member.name, drain), name=f"retire-{member.name}", daemon=True
        ).start()


def _look(member: Member) -> _Hand:
    try:
        with _channel(member) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            state = stub.GetStats(worker_pb2.GetStatsRequest(), timeout=_LOOK_TIMEOUT_S).state
    except grpc.RpcError:
        return _Hand(member, member.role, None)
    return _Hand(member, _ROLES.get(state.info.role, member.role), state.load)


def _channel(member: Member) -> grpc.Channel:
    assert member.health_address is not None
    return open_service_channel(member.health_address, member.tls, CertificateRole.WORKER)
