"""Which network devices UCX may use, so that it listens nowhere but where its process does."""

from __future__ import annotations

import ctypes
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

from transport.doctor.host import rdma_ports
from transport.errors import BackendUnavailable

LOOPBACK = "lo"
_RDMA = Path("/sys/class/infiniband")
# Where an address lies in what getifaddrs(3) points to.
_ADDRESSES: dict[int, tuple[int, int]] = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def devices_at(host: str, rdma: Path = _RDMA) -> str | None:
    """For UCX_NET_DEVICES: the interface that has the address of ``host``, which is looked up as for listening; beyond the
    loopback also the RDMA ports that are active, which listen on no address.  None where ``host`` is every interface's.
    Blocks for as long as the name takes.  Raises BackendUnavailable where no interface has it."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as e:
        raise BackendUnavailable(f"{host} is no address of this machine: {e.strerror}") from e
    address = ipaddress.ip_address(str(found).partition("%")[0])
    if address.is_loopback:
        return LOOPBACK
    if address.is_unspecified:
        return None
    names = [name for name, has in interfaces() if has == address]
    if not names:
        raise BackendUnavailable(
            f"no interface has the address {address}, so it is not known where UCX may listen; name the interface in "
            "UCX_NET_DEVICES"
        )
    ports = [f"{port.device}:{port.port}" for port in rdma_ports(rdma) if port.state == "ACTIVE"]
    return ",".join([names[0], *ports])


class _Entry(ctypes.Structure):
    """struct ifaddrs, as far as it is looked at."""


_Entry._fields_ = [
    ("next", ctypes.POINTER(_Entry)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def interfaces() -> Iterator[tuple[str, Address]]:
    """Each interface with each of its addresses."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Entry)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        raise BackendUnavailable(f"the interfaces cannot be listed: errno {ctypes.get_errno()}")
    try:
        entry = first
        while entry:
            at = entry.contents.address
            if at and (place := _ADDRESSES.get(ctypes.c_ushort.from_address(at).value)):
                offset, nbytes = place
                yield entry.contents.name.decode(), ipaddress.ip_address(ctypes.string_at(at + offset, nbytes))
            entry = entry.contents.next
    finally:
        libc.freeifaddrs(first)
