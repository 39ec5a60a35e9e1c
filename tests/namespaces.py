"""Processes on hosts of their own, as far as the network goes: a namespace and a real address for each, and a router in
between that drops packets by who sends them to whom."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Self

_PREFIX = "kvferry-"
_GATEWAY = "169.254.1.1"  # of every host: its end of the router's cable
_OUTSIDE = "outside"


class CannotPartition(Exception):
    """This machine, or this user, makes no namespaces; says why."""


class Network:
    """Enter to make it; leaving removes it.  ``cut`` and ``heal`` are for any thread.  This process reaches every host, as
    ``outside``.  Addresses are of 198.18.0.0/15, which is for tests (RFC 2544)."""

    def __init__(self, hosts: Iterable[str]) -> None:
        names = (*hosts, _OUTSIDE)
        self._pid = os.getpid()
        self._addresses = {name: f"198.18.{self._pid % 256}.{number}" for number, name in enumerate(names, 1)}
        self._router = f"{_PREFIX}{self._pid}-router"
        self._cuts: set[tuple[str, str]] = set()
        self._lock = threading.Lock()  # guards the cuts

    def address(self, host: str) -> str:
        return self._addresses[host]

    def command(self, host: str, command: tuple[str, ...]) -> tuple[str, ...]:
        """The command as it runs on ``host``, under the pid that it is started with."""
        return ("ip", "netns", "exec", self._namespace(host), *command)

    def cut(self, sender: str, receiver: str) -> None:
        """What ``sender`` sends to ``receiver`` is lost without a word; the other way nothing changes.  Idempotent."""
        with self._lock:
            if (sender, receiver) not in self._cuts:
                self._rule("add", sender, receiver)
                self._cuts.add((sender, receiver))

    def cut_both(self, one: str, other: str) -> None:
        self.cut(one, other)
        self.cut(other, one)

    def heal(self, *hosts: str) -> None:
        """All is delivered again; with ``hosts``, between these."""
        with self._lock:
            for sender, receiver in [cut for cut in self._cuts if not hosts or set(cut) <= set(hosts)]:
                self._rule("del", sender, receiver)
                self._cuts.remove((sender, receiver))

    def __enter__(self) -> Self:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise CannotPartition("network namespaces need root and iproute2's ip")
        _remove_abandoned()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        _ip("netns", "add", self._router)
        inside = ("netns", "exec", self._router)
        _ip(*inside, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0")
        for number, (host, address) in enumerate(self._addresses.items(), 1):
            ours, theirs = self._cable(number), f"port{number}"
            _ip("link", "add", ours, "type", "veth", "peer", theirs, "netns", self._router)
            _ip("-n", self._router, "addr", "add", f"{_GATEWAY}/32", "dev", theirs)
            _ip("-n", self._router, "link", "set", theirs, "up")
            _ip("-n", self._router, "route", "add", address, "dev", theirs)
            if host == _OUTSIDE:
                _ip("addr", "add", f"{address}/32", "dev", ours)
                _ip("link", "set", ours, "up")
                for other in self._addresses.values():
                    if other != address:
                        _ip("route", "add", other, "via", _GATEWAY, "dev", ours, "onlink", "src", address)
                continue
            namespace = self._namespace(host)
            _ip("netns", "add", namespace)
            _ip("link", "set", ours, "netns", namespace, "name", "eth0")
            _ip("-n", namespace, "addr", "add", f"{address}/32", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", namespace, "link", "set", device, "up")
            _ip("-n", namespace, "route", "add", "default", "via", _GATEWAY, "dev", "eth0", "onlink")

    def _rule(self, action: str, sender: str, receiver: str) -> None:
        addresses = ("from", self._addresses[sender], "to", self._addresses[receiver])
        _ip("-n", self._router, "rule", action, *addresses, "pref", "100", "blackhole")

    def _cable(self, number: int) -> str:
        return f"kvf{self._pid % 10**7}-{number}"  # the kernel takes 15 characters

    def _namespace(self, host: str) -> str:
        return f"{_PREFIX}{self._pid}-{host}"

    def _remove(self) -> None:
        """With a namespace the cables go that end in it, but not at once."""
        _remove_of(self._pid)
        cable = self._cable(len(self._addresses))
        subprocess.run(("ip", "link", "del", cable), check=False, capture_output=True)


def _remove_abandoned() -> None:
    """Of processes that were killed before they could."""
    for name in _names():
        pid = name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            _remove_of(int(pid))


def _remove_of(pid: int) -> None:
    for name in _names():
        if name.startswith(f"{_PREFIX}{pid}-"):
            subprocess.run(("ip", "netns", "del", name), check=False, capture_output=True)


def _names() -> list[str]:
    done = subprocess.run(("ip", "netns", "list"), check=False, capture_output=True, text=True)
    return [line.split()[0] for line in done.stdout.splitlines() if line.startswith(_PREFIX)]


def _ip(*arguments: str) -> None:
    done = subprocess.run(("ip", *arguments), check=False, capture_output=True, text=True)
    if done.returncode:
        raise CannotPartition(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
