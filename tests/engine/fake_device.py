"""CUDA's events and graphs on CPU: an event is done when the test says so, a graph computes again what it was made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from tests.engine import fake_flashinfer


class FakeMark:
    def __init__(self, reach: Callable[[], object], told: Callable[[], None] = lambda: None) -> None:
        """``reach``: what has happened once the device got here.  ``told``: when somebody waits for that."""
        self._done = threading.Event()
        self._reach, self._told = reach, told

    def done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        """As if the device had got there."""
        self._told()
        self.reach()

    def reach(self) -> None:
        self._reach()
        self._done.set()


class FakeDevice:
    """``marks``: all that were made, none of them done unless waited for, with ``is_busy``.  A fetched tensor is empty
    until a mark behind it is done.  ``log``: what was asked, in order, with the numbers of marks; ``plan`` is the kernels'.

    Fails where it, or one of its ``kernels``, is asked on a thread on which it is not current: there another GPU would do
    it, or none."""

    def __init__(self, *, is_busy: bool = False, place: str = "cpu") -> None:
        self.is_busy = is_busy
        self.place = torch.device(place)
        self.kernels = _Kernels(self)
        self.marks: list[FakeMark] = []
        self.log: list[str] = []
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
        number = len(self.marks)
        mark = FakeMark(lambda: self._arrive(fetched), lambda: self.log.append(f"wait {number}"))
        if not self.is_busy:
            mark.reach()
        self.marks.append(mark)
        self.log.append(f"mark {number}")
        return mark

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        self.check_current()
        host = torch.full(tensor.shape, 10**9, dtype=tensor.dtype)  # no token
        self._fetched.append((host, tensor))
        self.log.append("fetch")
        return host

    def _arrive(self, fetched: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for host, tensor in fetched:
            if tensor.is_meta:
                host.zero_()
            else:
                host.copy_(tensor)

    def capture(self, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        self.check_current()
        compute()
        result = compute().clone()

        def replay() -> None:
            self.check_current()
            self.num_replays += 1
            self.log.append("replay")
            result.copy_(compute())

        return result, replay


class _Kernels:
    """FlashInfer's stand-in, for a device that must be current when a name of it is asked for: some of its kernels take the
    current device, whatever their tensors say."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        self._device.check_current()
        found = getattr(fake_flashinfer, name)
        return partial(self._wrapper, found) if name.endswith("Wrapper") else found

    def _wrapper(self, made_by: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wrapper = made_by(*args, **kwargs)
        plan, run = wrapper.plan, wrapper.run

        def plan_here(*args: Any, **kwargs: Any) -> None:
            self._device.check_current()
            self._device.log.append("plan")
            plan(*args, **kwargs)

        def run_here(*args: Any, **kwargs: Any) -> Any:
            self._device.check_current()
            return run(*args, **kwargs)

        wrapper.plan, wrapper.run = plan_here, run_here
        return wrapper
