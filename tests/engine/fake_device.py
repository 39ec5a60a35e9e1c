"""CUDA's events and graphs on CPU: an event is done when the test says so, a graph computes again what it was made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.engine import fake_flashinfer


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
    until a mark behind it is done.  Fails where it, or one of its ``kernels``, is asked on a thread on which it is not
    current: there another GPU would do it, or none."""

    def __init__(self, *, is_busy: bool = False, place: str = "cpu") -> None:
        self.is_busy = is_busy
        self.place = torch.device(place)
        self.kernels = _Kernels(self)
        self.marks: list[FakeMark] = []
        self.num_replays = 0
        self._fetched: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._here = threading.local()

    @contextmanager
    def current(self) -> Iterator[None]:
        before, self._here.is_current = getattr(self._here, "is_current", False), True
        try:
            yield
        finally:
            self._here.is_current = before

    def check_current(self) -> None:
        assert getattr(self._here, "is_current", False), "this thread's current device is another one"

    def mark(self) -> FakeMark:
        self.check_current()
        fetched, self._fetched = self._fetched, []
        mark = FakeMark(lambda: [host.copy_(tensor) for host, tensor in fetched])
        if not self.is_busy:
            mark.wait()
        self.marks.append(mark)
        return mark

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        self.check_current()
        host = torch.full_like(tensor, 10**9)  # no token
        self._fetched.append((host, tensor))
        return host

    def capture(self, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        self.check_current()
        compute()
        result = compute().clone()

        def replay() -> None:
            self.check_current()
            self.num_replays += 1
            result.copy_(compute())

        return result, replay


class _Kernels:
    """FlashInfer's stand-in, for a device that must be current when a name of it is asked for: some of its kernels take the
    current device, whatever their tensors say."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        self._device.check_current()
        return getattr(fake_flashinfer, name)
