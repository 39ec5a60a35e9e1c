"""Blocks to a region of this process and back, moved by another process (this file, run), and the way that UCX says it
takes for them, which a region's path leaves open."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import transport
from tests.transport.peer import ROOT
from transport import Op

MIB = 1 << 20
NBYTES = 16 * MIB
PATTERN = b"\x05" * MIB
TIMEOUT_S = 120

# Of UCX_PROTO_INFO=y: what is moved, from or into which memory of the mover's, and a row for each range of sizes.
_OPERATION = re.compile(r"\| remote memory (write|read) by ucp_\S+ (?:from|into) (\w+)")
_ROW = re.compile(r"\| *\d\S* *\|[^|]*\| *(\S[^|]*?) *\|")


def exchange(ours: int | None, theirs: int | None, **environment: str) -> dict[tuple[str, str], str]:
    """``ours``, ``theirs``: the GPUs of this process's region and of the mover's, None for the host.  The transports by
    operation and the mover's memory, as in {("write", "cuda"): "cuda_ipc/cuda"}; empty where UCX moved nothing."""
    with transport.create("ucx") as t, t.allocate(NBYTES, ours) as region:
        done = subprocess.run(
            [sys.executable, "-m", "tests.transport.exchange", region.descriptor.hex(), str(theirs)],
            cwd=ROOT, env={**os.environ, "UCX_PROTO_INFO": "y", **environment},
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert bytes(region.fetch([MIB, 0], MIB)) == PATTERN * 2
        assert not any(region.fetch([2 * MIB], NBYTES - 2 * MIB))
    return ways(done.stdout)


def ways(told: str) -> dict[tuple[str, str], str]:
    """For the largest messages."""
    found: dict[tuple[str, str], str] = {}
    operation = ("", "")
    for line in told.splitlines():
        if match := _OPERATION.search(line):
            operation = (match[1], match[2])
        elif match := _ROW.search(line):
            found[operation] = match[1]
    return found


def move(descriptor: bytes, device: int | None) -> None:
    """What is read back was in the owner's region alone: zeros, then a block that went out from elsewhere."""
    with transport.create("ucx") as t, t.allocate(NBYTES, device) as local, t.open(descriptor) as remote:
        t.post(Op.READ, local, remote, [0], [0], NBYTES).wait(30)
        assert not any(local.fetch([0], NBYTES))
        with t.allocate(MIB) as pattern:
            pattern.view[:] = PATTERN
            t.post(Op.WRITE, pattern, remote, [0], [0], MIB).wait(30)
        t.post(Op.READ, local, remote, [4096], [0], MIB).wait(30)
        assert bytes(local.fetch([4096], MIB)) == PATTERN
        t.post(Op.WRITE, local, remote, [4096], [MIB], MIB).wait(30)


if __name__ == "__main__":
    move(bytes.fromhex(sys.argv[1]), None if sys.argv[2] == "None" else int(sys.argv[2]))
