"""Pools on a GPU between two processes, and between a GPU and the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import transport
from transport import Op

pytestmark = pytest.mark.gpu

MIB = 1 << 20
OWNER = """
import sys, transport
device = None if sys.argv[1] == "host" else 0
with transport.create("ucx") as t:
    region = t.allocate(16 << 20, device)
    print(region.descriptor.hex(), flush=True)
    sys.stdin.readline()
    print(bytes(region.fetch([1 << 20], 4096)).hex(), flush=True)
    region.release()
"""


@pytest.mark.parametrize(("ours", "theirs"), [("gpu", "gpu"), ("gpu", "host"), ("host", "gpu")])
def test_blocks_arrive_in_another_process(ours: str, theirs: str) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", OWNER, theirs]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        descriptor = bytes.fromhex(owner.stdout.readline())
        with transport.create("ucx") as t, t.allocate(16 * MIB, 0 if ours == "gpu" else None) as local:
            with t.open(descriptor) as remote:
                # What is read back was written by the owner's side alone: zeros, then a block that went out and home.
                t.post(Op.READ, local, remote, [0], [0], 16 * MIB).wait(30)
                assert bytes(local.fetch([0], 4096)) == bytes(4096)
                with t.allocate(MIB) as pattern:
                    pattern.view[:] = b"\x05" * MIB
                    t.post(Op.WRITE, pattern, remote, [0], [0], MIB).wait(30)
                t.post(Op.READ, local, remote, [0], [0], MIB).wait(30)
                t.post(Op.WRITE, local, remote, [0], [MIB], 4096).wait(30)
            print(file=owner.stdin, flush=True)
            assert owner.stdout.readline().strip() == (b"\x05" * 4096).hex()
