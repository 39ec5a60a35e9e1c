"""KV on its way into another type: copied from the pool, rounded, and laid out as the target's blocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from services.engine.layout import KvLayout
from services.prefill.pieces import Placement, stretches
from services.prefill.scratch import Claim, Scratch, plan_goes
from transport import Region, TransferCancelled

if TYPE_CHECKING:
    import torch


class Converter:
    """The memory that converted blocks are sent from, and the thread that fills it.  Owned by the event loop."""

    def __init__(self, pool: Sequence[Region], region: Region) -> None:
        """Reads from ``pool``, a region for each rank; all of ``region`` is scratch memory."""
        self.region = region
        self._pool = pool
        self._scratch = Scratch(region.nbytes)
        self._turns: dict[Claim, tuple[object, asyncio.Future[None]]] = {}  # with its holder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="convert")

    @property
    def is_unused(self) -> bool:
        return self._scratch.num_claims == 0

    def goes(self, target: KvLayout, begin: int, end: int) -> list[tuple[int, int]]:
        """Tokens [begin, end) in the parts that are converted one after the other."""
        _, step = plan_goes(target, self.region.nbytes)
        return [(first, min(first + step, end)) for first in range(begin, end, step)]

    @asynccontextmanager
    async def converted(
        self, source: Placement, target: KvLayout, begin: int, end: int, holder: object
    ) -> AsyncIterator[Placement]:
        """Where in ``region`` tokens [begin, end), one of ``goes``, lie in the target's type, all heads together, for as
        long as the context lasts.  Waits for its turn; raises TransferCancelled after ``withdraw(holder)``.  Outside the
        context nothing reads the source."""
        layout = replace(plan_goes(target, self.region.nbytes)[0], tp=1)
        num_blocks = -(-(end - begin) // layout.block_size)
        claim = self._scratch.claim(num_blocks * layout.block_nbytes)
        try:
            if claim.offset is None:
                granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._turns[claim] = holder, granted
                await granted
            assert claim.offset is not None
            scratch = Placement(layout, range(num_blocks), begin, claim.offset)
            work = (self._pool, self.region, source, scratch, begin, end)
            await asyncio.get_running_loop().run_in_executor(self._thread, convert, *work)
            yield scratch
        finally:
            self._turns.pop(claim, None)
            for served in self._scratch.give_back(claim):
                _, granted = self._turns[served]
                if not granted.done():  # else it gave up a moment ago, and will give back as well
                    granted.set_result(None)

    def withdraw(self, holder: object) -> None:
        """Whoever waits for room on the holder's behalf gives up.  What is being converted ends by itself, and soon."""
        for whose, granted in self._turns.values():
            if whose is holder and not granted.done():
                granted.set_exception(TransferCancelled("cancelled while it waited for room to convert"))

    def close(self) -> None:
        """Ends the thread.  The region is the transport's to release, with the transport itself."""
        self._thread.shutdown(cancel_futures=True)

    def check_integrity(self) -> None:
        """Raises AssertionError when the accounts of the scratch memory do not add up."""
        self._scratch.check_integrity()


def convert(pool: Sequence[Region], region: Region, source: Placement, target: Placement, begin: int, end: int) -> None:
    """Tokens [begin, end) from ``source``, in ``pool``, to ``target``, in ``region``, rounded to the nearest, ties to even.
    Blocks; runs on any thread."""
    _convert([r.view for r in pool], [region.view], source, target, begin, end)


def laid_out(pool: Sequence[Region], source: Placement, target: Placement, end: int) -> list[memoryview]:
    """As ``convert``, of all of the target's tokens before ``end``, into memory of its own, for each rank of the target."""
    sizes = [target.layout.of_rank(rank).block_nbytes for rank in range(target.layout.tp)]
    memory = [memoryview(bytearray(len(target.blocks) * nbytes)) for nbytes in sizes]
    pools, source = _on_host(pool, source, target.first_token, end)
    _convert(pools, memory, source, target, target.first_token, end)
    return memory


def _on_host(pool: Sequence[Region], source: Placement, begin: int, end: int) -> tuple[list[memoryview], Placement]:
    """The regions themselves, or of GPUs' copies of the blocks that hold tokens [begin, end), and where those lie there."""
    if pool[0].device is None:
        return [region.view for region in pool], source
    size = source.layout.block_size
    first = (begin - source.first_token) // size
    blocks = source.blocks[first : -(-(end - source.first_token) // size)]
    copies = []
    for rank, region in enumerate(pool):
        nbytes = source.layout.of_rank(rank).block_nbytes
        copies.append(region.fetch([source.base + block * nbytes for block in blocks], nbytes))
    return copies, Placement(source.layout, range(len(blocks)), source.first_token + first * size)


def _convert(pool: Sequence[memoryview], memory: Sequence[memoryview], source: Placement, target: Placement, begin: int,
             end: int) -> None:  # fmt: skip
    ours, theirs = _ranks(pool, source), _ranks(memory, target)
    firsts, counts = stretches(source, target, begin, end)
    places = np.stack([*source.locate(firsts), *target.locate(firsts), counts], axis=1).tolist()
    for our_heads, from_blocks in ours:
        for their_heads, to_blocks in theirs:
            heads = range(max(our_heads.start, their_heads.start), min(our_heads.stop, their_heads.stop))
            if not heads:
                continue
            taken = from_blocks[:, :, :, :, heads.start - our_heads.start : heads.stop - our_heads.start]
            filled = to_blocks[:, :, :, :, heads.start - their_heads.start : heads.stop - their_heads.start]
            for from_block, from_token, to_block, to_token, count in places:
                filled[to_block, :, :, to_token : to_token + count] = taken[
                    from_block, :, :, from_token : from_token + count
                ]


def _ranks(regions: Sequence[memoryview], placement: Placement) -> list[tuple[range, torch.Tensor]]:
    """Each rank's heads, and its blocks."""
    layout = placement.layout
    return [
        (heads, _blocks(region, layout.of_rank(rank), placement.base))
        for rank, (heads, region) in enumerate(zip(layout.head_shares, regions, strict=True))
    ]


def _blocks(region: memoryview, layout: KvLayout, base: int) -> torch.Tensor:
    import torch  # takes seconds to import, and only pools of unequal types or blocks need it

    from services.engine.weights import DTYPES

    dtype, num_blocks = DTYPES[layout.dtype], (region.nbytes - base) // layout.block_nbytes
    count = num_blocks * layout.block_nbytes // dtype.itemsize
    flat = torch.frombuffer(region, dtype=dtype, count=count, offset=base)
    return flat.view(num_blocks, *layout.block_shape)
