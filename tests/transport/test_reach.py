"""What a worker says of the ways to its pool."""

from __future__ import annotations

import pytest

import transport
from transport.reach import Reach, Way, look_at_reach, reach
from transport.ucp import SETTINGS

MEMORY, TCP, IB = Reach(Way.SHARED_MEMORY, "h"), Reach(Way.TCP), Reach(Way.RDMA, "InfiniBand")


@pytest.mark.parametrize(
    ("ucx_tls", "ways"),
    [
        (SETTINGS["UCX_TLS"], (MEMORY, TCP, IB)),
        ("all", (MEMORY, TCP, IB)),
        ("tcp", (TCP,)),
        ("posix,self", (MEMORY,)),
        ("rc,self", (IB,)),
        ("rc_x,ud:aux,posix", (MEMORY, IB)),
        ("^tcp", (MEMORY, IB)),
        ("^posix,ib", (TCP,)),
        ("^rc,ud,dc", (MEMORY, TCP)),
        ("^rc", (MEMORY, TCP, IB)),
        ("self", ()),
    ],
)
def test_ucx_tls_says_which(ucx_tls: str, ways: tuple[Reach, ...]) -> None:
    assert reach(ucx_tls, host="h", rdma_links=["InfiniBand"], on_gpu=False) == ways


def test_without_a_port_that_is_up_there_is_no_rdma() -> None:
    assert reach("all", host="h", rdma_links=[], on_gpu=False) == (MEMORY, TCP)


def test_a_pool_on_a_gpu_is_shared_by_what_cuda_has_for_it() -> None:
    assert reach("tcp,cuda", host="h", rdma_links=[], on_gpu=True) == (MEMORY, TCP)
    assert reach("tcp,cuda", host="h", rdma_links=[], on_gpu=False) == (TCP,)


def test_this_host_is_reached() -> None:
    with transport.create("ucx"):
        found = look_at_reach(on_gpu=False)
    assert Way.TCP in {r.way for r in found}
    assert all(len(r.scope) == 32 for r in found if r.way is Way.SHARED_MEMORY)
