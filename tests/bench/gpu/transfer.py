"""KV blocks between the pools of two processes, against a copy within the device's memory (the host's, without a GPU)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch

import transport
from services.engine.model_config import ModelConfig
from tests.bench.gpu import steps
from tests.bench.gpu.floors import BLOCK_SIZE, kv_token_nbytes
from tests.bench.gpu.rows import Row, moved
from tests.transport.peer import ProcessPeer
from transport import Op

GOAL = 0.85
TIMEOUT_S = 60.0


def measure(config: ModelConfig, device: int | None, nbytes: int, rounds: int) -> Iterator[Row]:
    """``nbytes`` in blocks of the shape, a block at least.  ``device``: the GPU of both pools; None: the host.  Blocks lie
    in another order on either side."""
    block_nbytes = BLOCK_SIZE * kv_token_nbytes(config)
    num_blocks = max(1, nbytes // block_nbytes)
    nbytes = num_blocks * block_nbytes
    here = [n * block_nbytes for n in range(num_blocks)]
    there = here[::-1]
    place = torch.device("cpu") if device is None else torch.device("cuda", device)
    source, target = (torch.ones(nbytes, dtype=torch.uint8, device=place) for _ in range(2))
    copy_s = steps.median_s(lambda: target.copy_(source), rounds, place)
    with (
        closing(ProcessPeer("ucx")) as peer,
        transport.create("ucx") as t,
        t.allocate(nbytes, device) as local,
        t.open(peer.allocate(nbytes, device)) as remote,
    ):
        for op in (Op.WRITE, Op.READ):
            took_s = steps.median_s(
                lambda op=op: t.post(op, local, remote, here, there, block_nbytes).wait(TIMEOUT_S), rounds, place
            )
            name = f"{config.name} {op.name.lower()} {num_blocks} blocks of {block_nbytes >> 10} KiB"
            yield moved(f"{name} to another process ({remote.path.value})", nbytes, took_s, copy_s, GOAL)
