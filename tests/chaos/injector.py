"""Brings faults about in a cluster of real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterError, Role
from tests.chaos.accounts import Accounts
from tests.chaos.oracle import History, Window
from tests.chaos.schedule import LEASE_S, Fault, Kind
from tests.namespaces import Network

RESTART_S = 90.0
FENCED_WITHIN_S = 15.0
_DRAIN_TIMEOUT_S = 40.0


class Injector:
    """Owned by one thread.  ``say`` takes a line for whoever watches."""

    def __init__(
        self,
        cluster: LocalCluster,
        accounts: Accounts,
        say: Callable[[str], None],
        network: Network | None = None,
    ) -> None:
        """``network`` is cut for partitions."""
        self.injected: Counter[Kind] = Counter()
        self.history = History()
        self.pids: set[int] = set()  # of all that ever ran
        self.unfenced: list[str] = []
        self._cluster = cluster
        self._accounts = accounts
        self._network = network
        self._say = say
        self._roles = {member.name: member.role for member in cluster.members}
        self._paused: dict[str, threading.Thread] = {}
        self._parted: list[threading.Thread] = []
        self.remember()

    def bring_about(self, fault: Fault) -> None:
        """Raises ClusterError when a member does not come back."""
        if fault.kind in (Kind.PAUSE, Kind.LONG_PAUSE) and self._is_paused(fault.member):
            return  # the end of one pause would be the end of the other
        self._say(str(fault))
        self.remember()
        match fault.kind:
            case Kind.KILL:
                if self._roles[fault.member] is Role.GATEWAY:
                    self.history.gateway_kills_s.append(time.monotonic())
                self._cluster.kill(fault.member)
            case Kind.PAUSE | Kind.LONG_PAUSE:
                self._pause(fault.member, fault.pause_s)
            case Kind.TERMINATE:
                self._cluster.kill(fault.member, signal.SIGTERM)
            case Kind.DRAIN:
                self._drain(fault.member)
                self._cluster.kill(fault.member, signal.SIGTERM)
            case Kind.PARTITION:
                self._part(fault)
            case Kind.ROLL:
                self._roll(fault.gently)
        self.injected[fault.kind] += 1

    def settle(self) -> None:
        """Returns when nobody is paused or cut off, and every member is there and known.  Raises ClusterError."""
        for thread in (*self._paused.values(), *self._parted):
            thread.join()
        self._paused.clear()
        self._parted.clear()
        for member in self._cluster.members:
            self._cluster.wait_ready(member.name, RESTART_S)
        self._await(self._accounts.all_there, "the gateways do not know every worker")
        self.remember()

    def remember(self) -> None:
        self.pids.update(pid for m in self._cluster.members if (pid := self._cluster.pid(m.name)) is not None)

    def _pause(self, name: str, for_s: float) -> None:
        pid = self._cluster.pid(name)
        # Who has no lease yet has none to sleep through.
        fences = for_s > LEASE_S and self._roles[name] in (Role.PREFILL, Role.DECODE) and self._accounts.is_known(name)
        self._cluster.kill(name, signal.SIGSTOP)

        def go_on() -> None:
            time.sleep(for_s)
            self._cluster.kill(name, signal.SIGCONT)  # whoever bears the name by now
            end_s = time.monotonic() + FENCED_WITHIN_S
            while fences and self._cluster.pid(name) == pid:
                if time.monotonic() > end_s:
                    self.unfenced.append(f"{name} went on after {for_s:.1f} s of sleep, longer than its lease")
                    return
                time.sleep(0.05)

        self._paused[name] = threading.Thread(target=go_on)
        self._paused[name].start()

    def _is_paused(self, name: str) -> bool:
        thread = self._paused.get(name)
        return thread is not None and thread.is_alive()

    def _part(self, fault: Fault) -> None:
        network = self._network
        assert network is not None, "there are no partitions without a network"
        cuts = [(fault.member, fault.other), (fault.other, fault.member)][: 1 if fault.one_way else 2]
        for cut in cuts:
            network.cut(*cut)

        def go_on() -> None:
            time.sleep(fault.pause_s)
            network.heal(fault.member, fault.other)

        self._parted.append(threading.Thread(target=go_on))
        self._parted[-1].start()

    def _drain(self, name: str) -> None:
        """As far as it goes: the worker may die, or be another's by now."""
        command = [sys.executable, "-m", "kvferry.cli", "drain", name, "--address", self._cluster.grpc_address]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_DRAIN_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            self._say(f"  {name} is not drained after {_DRAIN_TIMEOUT_S:.0f} s")
        else:
            if done.returncode:
                self._say(f"  {done.stderr.strip()}")

    def _roll(self, gently: bool) -> None:
        self.settle()
        began_s = time.monotonic()
        for member in self._cluster.members:
            name, pid = member.name, self._cluster.pid(member.name)
            if gently and member.role in (Role.PREFILL, Role.DECODE):
                self._drain(name)
            self._cluster.kill(name, signal.SIGTERM)
            self._await(lambda name=name, pid=pid: self._cluster.pid(name) not in (None, pid), f"{name} does not end")  # type: ignore[misc]
            self._cluster.wait_ready(name, RESTART_S)
            self._await(self._accounts.all_there, f"the gateways do not know {name}")
            self.remember()
        self.history.rolls.append(Window(began_s, time.monotonic()))

    def _await(self, holds: Callable[[], bool], otherwise: str) -> None:
        end_s = time.monotonic() + RESTART_S
        while not holds():
            if time.monotonic() > end_s:
                raise ClusterError(f"{otherwise}, after {RESTART_S:.0f} s")
            time.sleep(0.1)
