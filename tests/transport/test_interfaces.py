"""Where UCX listens."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

from tests.listening import listening
from transport import BackendUnavailable
from transport.interfaces import devices_at, interfaces

ROOT = Path(__file__).parents[2]
_SIOCGIFADDR = 0x8915
OWNER = """
    import sys, transport
    from transport.interfaces import devices_at
    import os
    os.environ["UCX_NET_DEVICES"] = devices_at(sys.argv[1])
    with transport.create("ucx"):
        print("ready", flush=True)
        sys.stdin.read()
    """


def address_of(name: str) -> IPv4Address | None:
    """As the kernel tells by another way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("16sH14s", name.encode(), socket.AF_INET, b""))
        except OSError:
            return None
        return IPv4Address(answer[20:24])


NAMES = [name for _, name in socket.if_nameindex()]
BEYOND = [(name, address) for name in NAMES if (address := address_of(name)) and not address.is_loopback]


def test_every_interface_is_listed_with_its_addresses() -> None:
    found = list(interfaces())
    assert {name for name, _ in found} <= set(NAMES)
    for name in NAMES:
        if (address := address_of(name)) is not None:
            assert (name, address) in found
    with open("/proc/net/if_inet6") as lines:
        for line in lines:
            digits, *_, name = line.split()
            assert (name, ip_address(bytes.fromhex(digits))) in found


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_on_the_loopback_there_is_nothing_but_the_loopback(host: str, tmp_path: Path) -> None:
    port_of(tmp_path, "mlx5_0", "4: ACTIVE")
    assert devices_at(host, tmp_path) == "lo"


def test_an_address_of_every_interface_is_every_interface() -> None:
    assert devices_at("0.0.0.0") is None
    assert devices_at("::") is None


def port_of(directory: Path, device: str, state: str) -> None:
    port = directory / device / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(state + "\n")


@pytest.mark.skipif(not BEYOND, reason="this machine has no address beyond the loopback")
def test_beyond_it_there_are_the_interface_and_the_ports_of_rdma(tmp_path: Path) -> None:
    (name, address), *_ = BEYOND
    assert devices_at(str(address), tmp_path) == name
    port_of(tmp_path, "mlx5_0", "4: ACTIVE")
    port_of(tmp_path, "mlx5_1", "1: DOWN")
    assert devices_at(str(address), tmp_path) == f"{name},mlx5_0:1"


@pytest.mark.skipif(not BEYOND, reason="this machine has no address beyond the loopback")
def test_ucx_listens_there_and_nowhere_else() -> None:
    (_, address), *_ = BEYOND
    clean = {k: v for k, v in os.environ.items() if not k.startswith("UCX_")}
    code = "\n".join(line.removeprefix("    ") for line in OWNER.splitlines())
    with subprocess.Popen(
        [sys.executable, "-c", code, str(address)], cwd=ROOT, env=clean, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:  # fmt: skip
        assert owner.stdin is not None
        assert owner.stdout is not None
        try:
            assert owner.stdout.readline() == "ready\n"
            assert set(listening(owner.pid)) == {address}
        finally:
            owner.stdin.close()


def test_an_address_of_another_machine_is_one_clear_sentence() -> None:
    with pytest.raises(BackendUnavailable, match=r"no interface has the address 203\.0\.113\.1.*UCX_NET_DEVICES"):
        devices_at("203.0.113.1")
