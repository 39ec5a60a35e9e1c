"""Memory of a GPU that a second process stores in, as the ranks of a worker do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import transport

pytestmark = pytest.mark.gpu

MIB = 1 << 20
BORROWER = """
import sys, torch, transport
from services.engine.flashinfer_runner import cuda_arena
from services.engine.layout import KvLayout
memory = transport.borrow(bytes.fromhex(sys.argv[1]))
place = torch.device("cuda", memory.device)
torch.cuda.set_device(place)
arena = cuda_arena(memory.address, 4, KvLayout("r", "bfloat16", 16, 2, 2, 64), place, memory)
assert not arena.any()
arena[3] = 5
torch.cuda.synchronize()
"""


@pytest.mark.usefixtures("place")
def test_a_second_process_stores_in_memory_that_it_was_lent() -> None:
    with transport.create("ucx") as owner, owner.allocate(16 * MIB, 0) as region:
        subprocess.run(
            [sys.executable, "-c", BORROWER, region.lend().hex()],
            cwd=Path(__file__).parents[2],
            check=True,
            timeout=120,
        )
        nbytes = 2 * 2 * 16 * 2 * 64 * 2
        found = np.frombuffer(region.fetch([3 * nbytes, 2 * nbytes], nbytes), np.uint16)
    five = torch.tensor([5], dtype=torch.bfloat16).view(torch.uint16).item()
    assert (found[: nbytes // 2] == five).all()
    assert not found[nbytes // 2 :].any()
