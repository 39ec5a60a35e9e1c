"""Memory of a GPU in a second process, and a worker's two ranks on two GPUs, over NCCL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import transport
from services.engine.batch import Entry
from services.engine.model_files import ModelFiles
from services.engine.weights import load_weights
from tests.engine.paging import GREEDY, PagedModel
from tests.worker.leading import PROMPTS
from tests.worker.test_ranks import leader

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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_draw_what_float32_finds_likely(smollm2: ModelFiles) -> None:
    with leader(smollm2, "bfloat16", "gpu") as two:
        greedy: list[list[int]] = json.loads(two.hear("tokens"))
    paged = PagedModel(smollm2.config, load_weights(smollm2.config, smollm2.path, "float32"), num_blocks=64)
    for text, drawn in zip(PROMPTS, greedy, strict=True):
        tokens = smollm2.tokenizer.encode(text, add_special=True)
        table = paged.table(len(tokens) + len(drawn))
        start = 0
        for token in drawn:
            logits = paged.logits([Entry(tokens[start:], start, table, GREEDY)])[0]
            assert token in np.argsort(logits)[-2:]
            start = len(tokens)
            tokens.append(token)
