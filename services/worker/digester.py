"""Digests blocks of this worker's pool off the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

from services.engine.digest import digest_blocks
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
        """As ``digest_blocks``.  Cancelling it drops it if it has not begun; otherwise it still reads the blocks."""
        worker = self._worker
        region, nbytes = worker.region, worker.layout.block_nbytes
        if region.device is None:
            return self._start(lambda: region.view, worker.layout, blocks, first_index, num_prompt_tokens)
        make = partial(region.fetch, [block * nbytes for block in blocks], nbytes)
        return self._start(make, worker.layout, range(len(blocks)), first_index, num_prompt_tokens)

    def digest_made(
        self,
        make: Callable[[], memoryview],
        layout: KvLayout,
        num_blocks: int,
        first_index: int,
        num_prompt_tokens: int,
    ) -> asyncio.Future[list[int]]:
        """As ``digest``, of blocks of another layout, which ``make`` makes on the digester's thread, one behind the
        other."""
        return self._start(make, layout, range(num_blocks), first_index, num_prompt_tokens)

    def _start(
        self,
        memory: Callable[[], memoryview],
        layout: KvLayout,
        blocks: Sequence[int],
        first_index: int,
        num_prompt_tokens: int,
    ) -> asyncio.Future[list[int]]:
        def run() -> list[int]:
            started_s = time.monotonic()
            digests = digest_blocks(memory(), layout, blocks, first_index, num_prompt_tokens)
            traffic = self._worker.traffic
            traffic.digest_s += time.monotonic() - started_s
            traffic.bytes_digested += len(blocks) * layout.block_nbytes
            return digests

        return asyncio.get_running_loop().run_in_executor(self._executor, run)
