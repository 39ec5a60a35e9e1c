"""Digests blocks of this worker's pool off the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from services.engine.digest import digest_on_ranks
from services.engine.layout import KvLayout
from services.worker.worker import Worker


class Digester:
    """One thread: verifying takes one core at most, and what is asked for first is ready first.  A context manager, owned
    by the event loop."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="digest")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Drops what waits; the blocks under way are read to their end."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def digest(self, blocks: tuple[int, ...], first_index: int, num_prompt_tokens: int) -> asyncio.Future[list[int]]:
        """As ``digest_on_ranks``.  Cancelling it drops it if it has not begun; otherwise it still reads the blocks."""
        worker = self._worker
        regions, layout = worker.regions, worker.layout
        if worker.region.device is None:
            return self._start(lambda: [r.view for r in regions], layout, blocks, first_index, num_prompt_tokens)

        def fetch() -> list[memoryview]:
            sizes = [layout.of_rank(rank).block_nbytes for rank in range(layout.tp)]
            return [r.fetch([block * n for block in blocks], n) for r, n in zip(regions, sizes, strict=True)]

        return self._start(fetch, layout, range(len(blocks)), first_index, num_prompt_tokens)

    def digest_made(
        self,
        make: Callable[[], Sequence[memoryview]],
        layout: KvLayout,
        num_blocks: int,
        first_index: int,
        num_prompt_tokens: int,
    ) -> asyncio.Future[list[int]]:
        """As ``digest``, of blocks of another layout, which ``make`` makes on the digester's thread, one behind the
        other, for each of its ranks."""
        return self._start(make, layout, range(num_blocks), first_index, num_prompt_tokens)

    def _start(
        self,
        memory: Callable[[], Sequence[memoryview]],
        layout: KvLayout,
        blocks: Sequence[int],
        first_index: int,
        num_prompt_tokens: int,
    ) -> asyncio.Future[list[int]]:
        def run() -> list[int]:
            started_s = time.monotonic()
            digests = digest_on_ranks(memory(), layout, blocks, first_index, num_prompt_tokens)
            traffic = self._worker.traffic
            traffic.digest_s += time.monotonic() - started_s
            traffic.bytes_digested += len(blocks) * layout.block_nbytes
            return digests

        return asyncio.get_running_loop().run_in_executor(self._executor, run)
