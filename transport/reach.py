"""By which ways peers could get at a pool of this process.  Nothing is tried: that is the doctor's part."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from transport.build import ucx_libraries
from transport.doctor.host import rdma_permitted, rdma_ports
from transport.segments import this_host
from transport.ucp import may_map

_RDMA_FAMILIES = frozenset({"rc", "ud", "dc"})


class Way(StrEnum):
    SHARED_MEMORY = "shared-memory"
    TCP = "tcp"
    RDMA = "rdma"


@dataclass(frozen=True, slots=True)
class Reach:
    """Two processes share a way whose scope is equal: the host, for shared memory, the link layer, for RDMA."""

    way: Way
    scope: str = ""


def look_at_reach(*, on_gpu: bool) -> tuple[Reach, ...]:
    """Of a pool in this process's UCX transport, which must have been created.  Empty: not known."""
    links = set()
    if rdma_permitted() and any((ucx_libraries() / "ucx").glob("libuct_ib*.so*")):
        links = {port.link_layer for port in rdma_ports(Path("/sys/class/infiniband")) if port.state == "ACTIVE"}
    return reach(os.environ["UCX_TLS"], host=this_host().hex(), rdma_links=links, on_gpu=on_gpu)


def reach(ucx_tls: str, *, host: str, rdma_links: Iterable[str], on_gpu: bool) -> tuple[Reach, ...]:
    """``ucx_tls`` lists what may be used or, after a ^, what may not.  ``rdma_links``: link layers of the ports that are
    up."""
    names = {name.lstrip("\\").partition(":")[0] for name in ucx_tls.lstrip("^").split(",")}
    forbids = ucx_tls.startswith("^")
    found = []
    if may_map(ucx_tls) or (on_gpu and forbids != bool(names & {"cuda", "cuda_ipc"})):
        found.append(Reach(Way.SHARED_MEMORY, host))
    if forbids != bool(names & {"tcp", "all"}):
        found.append(Reach(Way.TCP))
    families = {name.partition("_")[0] for name in names}
    if not names >= _RDMA_FAMILIES and "ib" not in names if forbids else families & (_RDMA_FAMILIES | {"ib", "all"}):
        found += [Reach(Way.RDMA, link) for link in sorted(rdma_links)]
    return tuple(found)
