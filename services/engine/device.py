"""What a runner asks of an accelerator beyond torch's tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from services.engine.ready import Ready

# Kinds of devices that fetch from the host's memory by themselves where it is pinned.
PINNED_FOR = frozenset({"cuda"})


class Device(Protocol):
    """What is asked of it happens in the order of asking, in one stream, and nobody waits for it.  All but ``place`` and
    ``current`` is asked while that is open."""

    @property
    def place(self) -> torch.device: ...

    def current(self) -> AbstractContextManager[object]:
        """While it is open, kernels, streams, events and graphs that this thread makes or calls are this device's also
        where no tensor says which.  Each thread has a current device of its own, the first GPU unless told."""

    def mark(self) -> Ready:
        """Is done when all that was asked so far is."""

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the host's memory, to be looked at once a mark made later is done."""

    def capture(self, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Runs ``compute`` and keeps what it asked of the device: the tensor it returned, which each call of the other
        fills anew from what the tensors that it reads hold then.  Blocks."""


class CudaDevice:
    """Of one GPU, its current stream.  Never run on a device; tests run what stands on it with a stand-in."""

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self._graphs = torch.cuda.graph_pool_handle()

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.place)

    def mark(self) -> CudaMark:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a wait leaves the processor to others
        event.record(torch.cuda.current_stream(self.place))
        return CudaMark(event, self.place)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def capture(self, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        current = torch.cuda.current_stream(self.place)
        side = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            compute()  # what a first call does besides cannot be captured
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The graphs' memory is one pool: they run one after the other.
        with torch.cuda.graph(graph, pool=self._graphs):
            result = compute()
        return result, graph.replay


def pinned(host: torch.Tensor, place: torch.device) -> torch.Tensor:
    """The same numbers, to be copied to ``place`` by ``non_blocking``: from other memory, that may wait for the device."""
    return host.pin_memory() if place.type in PINNED_FOR else host


class CudaMark:
    """Asked on a thread that has another GPU current, or none, it takes no memory of that one for a context."""

    def __init__(self, event: torch.cuda.Event, place: torch.device) -> None:
        self._event, self._place = event, place

    def done(self) -> bool:
        with torch.cuda.device(self._place):
            return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        with torch.cuda.device(self._place):
            self._event.synchronize()
