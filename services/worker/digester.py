"""Digests blocks of this worker's pool off the event loop."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from services.engine.digest import digest_blocks
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
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._executor, self._digest, blocks, first_index, num_prompt_tokens)

    def _digest(self, blocks: tuple[int, ...], first_index: int, num_prompt_tokens: int) -> list[int]:
        worker = self._worker
        started_s = time.monotonic()
        digests = digest_blocks(worker.region.view, worker.layout, blocks, first_index, num_prompt_tokens)
        worker.traffic.digest_s += time.monotonic() - started_s
        worker.traffic.bytes_digested += len(blocks) * worker.layout.block_nbytes
        return digests
