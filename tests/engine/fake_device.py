"""CUDA's events and graphs on CPU: an event is done when the test says so, a graph computes again what it was made of."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class FakeMark:
    def __init__(self, *, is_done: bool) -> None:
        self._done = threading.Event()
        self.num_waits = 0
        if is_done:
            self._done.set()

    def done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        """As if the device had got there."""
        self.num_waits += 1
        self._done.set()


class FakeDevice:
    """``marks``: all that were made, none of them done unless waited for, with ``is_busy``."""

    place = torch.device("cpu")

    def __init__(self, *, is_busy: bool = False) -> None:
        self.is_busy = is_busy
        self.marks: list[FakeMark] = []
        self.num_replays = 0

    def mark(self) -> FakeMark:
        mark = FakeMark(is_done=not self.is_busy)
        self.marks.append(mark)
        return mark

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def capture(self, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        compute()
        result = compute().clone()

        def replay() -> None:
            self.num_replays += 1
            result.copy_(compute())

        return result, replay
