"""What is left of the GIL: a Python thread that counts as fast as it can."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Counter:
    """Counts in a thread of its own while the context lasts."""

    def __enter__(self) -> Self:
        self._count = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stopping = True
        self._thread.join()

    def rate_during(self, action: Callable[[], object]) -> float:
        """Counts per second while ``action`` runs in the calling thread."""
        first, began = self._count, time.monotonic()
        action()
        return (self._count - first) / (time.monotonic() - began)

    def _run(self) -> None:
        while not self._stopping:
            self._count += 1
