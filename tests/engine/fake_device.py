"""CUDA's events and graphs on CPU: an event is done when the test says so, a graph computes again what it was made of."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class FakeMark:
    def __init__(self, reach: Callable[[], None]) -> None:
        """``reach``: what has happened once the device got here."""
        self._done = threading.Event()
        self._reach = reach

    def done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        """As if the device had got there."""
        self._reach()
        self._done.set()


class FakeDevice:
    """``marks``: all that were made, none of them done unless waited for, with ``is_busy``.  A fetched tensor is empty
    until a mark behind it is done."""

    place = torch.device("cpu")

    def __init__(self, *, is_busy: bool = False) -> None:
        self.is_busy = is_busy
        self.marks: list[FakeMark] = []
        self.num_replays = 0
        self._fetched: list[tuple[torch.Tensor, torch.Tensor]] = []

    def mark(self) -> FakeMark:
        fetched, self._fetched = self._fetched, []
        mark = FakeMark(lambda: [host.copy_(tensor) for host, tensor in fetched])
        if not self.is_busy:
            mark.wait()
        self.marks.append(mark)
        return mark

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.full_like(tensor, 10**9)  # no token
        self._fetched.append((host, tensor))
        return host

    def capture(self, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        compute()
        result = compute().clone()

        def replay() -> None:
            self.num_replays += 1
            result.copy_(compute())

        return result, replay
