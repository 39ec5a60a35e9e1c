"""Facts that the kernel tells."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path

from transport import segments
from transport.doctor.facts import Host, RdmaPort

FIRST_PID_NAMESPACE = 0xEFFFFFFC  # its inode is the same in every Linux


def look_at_host(environment: Mapping[str, str]) -> Host:
    return Host(
        kernel=os.uname().release,
        shmem_huge_pages=chosen(_text(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))),
        available_nbytes=segments.available_memory(),
        group_limit_nbytes=_number(_text(segments.CONTROL_GROUP / "memory.max")),
        locked_limit_nbytes=_limit(resource.RLIMIT_MEMLOCK),
        max_open_files=_limit(resource.RLIMIT_NOFILE),
        user=os.geteuid(),
        own_pid_namespace=os.stat("/proc/self/ns/pid").st_ino != FIRST_PID_NAMESPACE,
        num_other_containers=num_other_containers(Path("/proc")),
        hidepid=hidepid(_text(Path("/proc/self/mounts"))),
        variables={name: environment[name] for name in sorted(environment) if name.startswith("UCX_")},
        rdma_ports=rdma_ports(Path("/sys/class/infiniband")),
        rdma_permitted=rdma_permitted(),
        cuda_devices=tuple(sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))),
    )


def rdma_ports(directory: Path) -> tuple[RdmaPort, ...]:
    return tuple(
        RdmaPort(
            device=port.parent.parent.name,
            port=int(port.name),
            state=_text(port / "state").rpartition(": ")[2],
            rate=_text(port / "rate"),
            link_layer=_text(port / "link_layer"),
        )
        for port in sorted(directory.glob("*/ports/*"))
    )


def rdma_permitted() -> bool:
    return any(os.access(path, os.R_OK | os.W_OK) for path in Path("/dev/infiniband").glob("uverbs*"))


def num_other_containers(proc: Path) -> int:
    """Mount namespaces, other than this process's, of processes whose memory could be mapped.  0 outside of containers
    says little: a process of the host sees those of every container."""
    found = {_mount_namespace(process) for process in proc.glob("[0-9]*")}
    return len(found - {_mount_namespace(proc / "self"), ""})


def _mount_namespace(process: Path) -> str:
    """Empty where it may not be looked at: then its memory may not either."""
    try:
        return os.readlink(process / "ns/mnt")
    except OSError:
        return ""


def chosen(choices: str) -> str:
    """The one in brackets of "always [never]", empty where there is none."""
    found = re.search(r"\[(\w+)\]", choices)
    return found[1] if found else ""


def hidepid(mounts: str) -> str:
    """The option of /proc in proc(5)'s mounts, empty where it hides nothing."""
    for line in mounts.splitlines():
        _, where, _, options, *_ = line.split()
        if where == "/proc":
            found = re.search(r"\bhidepid=(\w+)", options)
            return found[1] if found and found[1] not in ("0", "off") else ""
    return ""


def _text(path: Path) -> str:
    """Empty where the kernel has no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _limit(what: int) -> int | None:
    soft, _ = resource.getrlimit(what)
    return None if soft == resource.RLIM_INFINITY else soft
