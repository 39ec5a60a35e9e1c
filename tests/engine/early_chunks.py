"""Chunks of a prompt that are written to another process while the next one computes, as a prefill worker does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

import transport
from services.engine.batch import Entry, build_batch
from services.engine.flashinfer_runner import FlashInferRunner, cuda_arena
from services.engine.layout import KvLayout
from services.engine.weights import DTYPES
from tests.transport.peer import ProcessPeer
from transport import Op, Region, RemoteRegion, Transport

CHUNK_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class Shipped:
    """``num_pending`` of ``num_chunks`` were still to come when the runner returned.  ``sent``: what the pool holds in the
    end, ``arrived``: the other process's."""

    num_chunks: int
    num_pending: int
    sent: bytes
    arrived: bytes


def ship(make: Callable[[torch.Tensor], FlashInferRunner], keep_busy: Callable[[], None], layout: KvLayout,
         ids: Sequence[int], device: int | None) -> Shipped:  # fmt: skip
    """``make``: a runner that returns early, on a pool that it is given, on the GPU of that number or on the host.
    ``keep_busy``: called before each chunk, so that what is written too early would be written wrong."""
    num_blocks = len(ids) // layout.block_size
    nbytes = num_blocks * layout.block_nbytes
    with closing(ProcessPeer("ucx")) as peer, transport.create("ucx") as t, t.allocate(nbytes, device) as region:
        with t.open(peer.allocate(nbytes, device)) as remote:
            pending = _compute(make(_arena(region, num_blocks, layout)), keep_busy, layout, ids, t, region, remote)
        return Shipped(len(pending), sum(pending), bytes(region.fetch([0], nbytes)), peer.read(0, nbytes))


def _compute(runner: FlashInferRunner, keep_busy: Callable[[], None], layout: KvLayout, ids: Sequence[int], t: Transport,
             region: Region, remote: RemoteRegion) -> list[bool]:  # fmt: skip
    num_blocks = len(ids) // layout.block_size

    def write(blocks: range) -> None:
        offsets = [block * layout.block_nbytes for block in blocks]
        t.post(Op.WRITE, region, remote, offsets, offsets, layout.block_nbytes).wait(60)

    pending = []
    before, before_ready = range(0), None
    for first in range(0, num_blocks, CHUNK_BLOCKS):
        blocks = range(first, min(first + CHUNK_BLOCKS, num_blocks))
        start, end = blocks.start * layout.block_size, blocks.stop * layout.block_size
        keep_busy()
        runner.run(build_batch([Entry(ids[start:end], start, range(num_blocks), None)], layout.block_size))
        assert runner.ready is not None
        pending.append(not runner.ready.done())
        if before_ready is not None:
            assert before_ready.done()
            write(before)
        before, before_ready = blocks, runner.ready
    assert before_ready is not None
    before_ready.wait()
    write(before)
    return pending


def _arena(region: Region, num_blocks: int, layout: KvLayout) -> torch.Tensor:
    if region.device is not None:
        return cuda_arena(region.address, num_blocks, layout, torch.device("cuda", region.device), region)
    return torch.frombuffer(region.view, dtype=DTYPES[layout.dtype]).view(num_blocks, *layout.block_shape)
