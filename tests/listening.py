"""Where a process accepts connections."""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from pathlib import Path


def listening(pid: int | None) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Of each TCP socket that does, in the process's own network namespace (proc(5))."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(descriptor.readlink().name)
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            local, state = fields[1], fields[3]
            if state == "0A" and f"socket:[{fields[9]}]" in links:
                words = bytes.fromhex(local.partition(":")[0])
                in_order = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                address = ipaddress.ip_address(in_order)
                found.append(getattr(address, "ipv4_mapped", None) or address)
    return found
