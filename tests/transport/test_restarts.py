"""Peers that come, write, and go badly, many times: what stays must be as it was before."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from multiprocessing.connection import Connection

import pytest

import transport
from transport import Op, PeerLost, Transport, TransportError

MIB = 1 << 20
NUM_RESTARTS = 200


def neighbour(pipe: Connection, tcp: bool) -> None:
    """A pool of its own, and a batch without end into the other's."""
    if tcp:
        os.environ["UCX_TLS"] = "tcp,self"
    with transport.create("ucx") as t, t.allocate(MIB) as local:
        pipe.send_bytes(local.descriptor)
        remote = t.open(pipe.recv_bytes())
        under_way = t.post(Op.WRITE, local, remote, [0] * 4096, [0] * 4096, MIB)
        pipe.send_bytes(b"writing")
        pipe.recv_bytes()
        under_way.cancel()
        with pytest.raises(TransportError):
            under_way.wait(5)
        remote.close()


def footprint() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/maps") as maps:
        lines = list(maps)
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "segments": sum("memfd:kvferry" in line for line in lines),
        "shared memory files": sum("ucx" in name for name in os.listdir("/dev/shm")),
    }


def left_behind(before: dict[str, int]) -> dict[str, int]:
    """What there is more of than before, once connections that have ended have been taken down."""
    deadline = time.monotonic() + 5
    while (more := {k: n for k, n in footprint().items() if n > before.get(k, 0)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    return more


@pytest.mark.parametrize(("tcp", "num_restarts"), [(False, NUM_RESTARTS), (True, 40)], ids=["mapped", "tcp"])
def test_restarts_of_neighbours_leave_nothing_behind(tcp: bool, num_restarts: int) -> None:
    """Killed in mid-write and closed in turns; each is a new incarnation at the same place."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.transport.loaded", __name__])
    incarnations = set()

    def cycle(ours: Transport, number: int) -> None:
        here, there = processes.Pipe()
        with here, there:
            process = processes.Process(target=neighbour, args=(there, tcp))
            process.start()
            with ours.open(here.recv_bytes()) as remote:
                assert remote.path is (transport.Path.RMA if tcp else transport.Path.MAPPED)
                incarnations.add(remote.incarnation)
                here.send_bytes(pool.descriptor)
                assert here.recv_bytes() == b"writing"
                ours.post(Op.WRITE, source, remote, [0], [0], MIB).wait(5)
                if number % 2:
                    process.kill()
                    process.join(5)
                    with pytest.raises(PeerLost):
                        ours.post(Op.WRITE, source, remote, [0] * 8, [0] * 8, MIB).wait(5)
                else:
                    here.send_bytes(b"end")
                    process.join(5)
                    assert process.exitcode == 0
            process.close()

    with transport.create("ucx") as ours, ours.allocate(MIB) as source, ours.allocate(MIB) as pool:
        for number in range(4):
            cycle(ours, number)
        before = footprint()
        for number in range(num_restarts):
            cycle(ours, number)
        assert left_behind(before) == {}
    assert len(incarnations) == num_restarts + 4
