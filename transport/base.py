"""The seam between those who own blocks and what carries their bytes.

Life of a transfer: ``allocate`` a region -> give its ``descriptor`` to the other process -> there, ``open`` it ->
``post`` batches of writes or reads -> await each ``Transfer`` -> close the remote region, ``release`` the region.
Operations are one-sided: the region's owner takes no part and is not told.

Any thread may call anything here; a call blocks only where its docstring says so.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from transport.errors import TransportClosed, TransportError
from transport.pieces import Offsets


class Op(StrEnum):
    WRITE = "write"  # local to remote
    READ = "read"  # remote to local


class Path(StrEnum):
    """How the bytes went."""

    MAPPED = "mapped"  # plain loads and stores in the owner's memory, mapped into this process
    RMA = "rma"  # the backend's put and get: a network, or an emulation of one (see ADR 1 for reads over tcp)
    LOOPBACK = "loopback"  # within this process


class TransferResult(NamedTuple):
    """``num_blocks`` as posted, ``num_pieces`` after neighbours were merged; ``queued_s`` until the first byte,
    ``busy_s`` from then on until the last one was where it belongs."""

    nbytes: int
    num_blocks: int
    num_pieces: int
    queued_s: float
    busy_s: float
    path: Path


@dataclass(slots=True)
class Counters:
    """Totals since the start.  Bytes and pieces are those of transfers that succeeded."""

    num_posted: int = 0
    num_succeeded: int = 0
    num_cancelled: int = 0
    num_failed: int = 0
    num_pieces: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    bytes_by_path: dict[Path, int] = field(default_factory=dict)


class Transfer:
    """One posted batch.  Await it in the loop the transport is attached to, or call ``wait`` elsewhere.

    Succeeds with TransferResult.  Fails with TransferCancelled after ``cancel``, PeerLost, TransportClosed, or another
    TransportError.  Success means that the bytes are in place, not that the owner still lives to use them.  Whoever wrote
    has stopped for good once the future holds a result or TransferCancelled; PeerLost proves this only together with the
    end of the peer's process.
    """

    __slots__ = ("_cancel", "_future", "_outcome", "_wait")

    def __init__(
        self,
        cancel: Callable[[], None],
        wait: Callable[[Transfer, float], None],
        outcome: TransferResult | TransportError | None = None,
    ) -> None:
        """With an ``outcome`` it has ended already."""
        self._cancel = cancel
        self._wait = wait
        self._outcome = outcome
        self._future = _new_future() if outcome is None else None

    @property
    def future(self) -> Future[TransferResult]:
        if self._future is None:  # ended from the start: most never need one, and it costs more than a small transfer
            assert self._outcome is not None
            self._future = _new_future()
            _settle(self._future, self._outcome)
        return self._future

    def end(self, outcome: TransferResult | TransportError) -> None:
        """For the transport."""
        self._outcome = outcome
        _settle(self.future, outcome)  # made with the transfer

    @property
    def done(self) -> bool:
        return self._outcome is not None

    def cancel(self) -> None:
        """Asks the writer to stop at the next piece and returns.  The future resolves only once it did; a transfer that
        had already got to its end succeeds."""
        if not self.done:
            self._cancel()

    def wait(self, timeout_s: float) -> TransferResult:
        """Blocks.  Raises TimeoutError when the outcome is still open; the transfer then goes on."""
        if isinstance(self._outcome, TransferResult):
            return self._outcome
        self._wait(self, timeout_s)
        return self.future.result(0)

    def __await__(self) -> Generator[object, None, TransferResult]:
        """Cancelling the awaiting task leaves the transfer running: call ``cancel``, then await again for the proof."""
        return asyncio.wrap_future(self.future).__await__()


class DeviceMemory(Protocol):
    @property
    def device(self) -> int: ...

    def fetch(self, offsets: Sequence[int], size: int) -> memoryview: ...


class Region:
    """Memory that peers can reach, owned by the transport that allocated it.  A context manager."""

    def __init__(
        self,
        address: int,
        nbytes: int,
        descriptor: bytes,
        release: Callable[[Region], None],
        *,
        huge_pages: bool = False,
        device: DeviceMemory | None = None,
        lend: Callable[[], bytes] | None = None,
    ) -> None:
        """``device``: what the address is of, where that is not the host's memory.  ``lend``: see there."""
        self.address = address
        self.nbytes = nbytes
        self.descriptor = descriptor
        self.huge_pages = huge_pages  # of 2 MiB, wherever a whole one fits
        self.num_in_flight = 0  # guarded by the transport
        self.released = False  # guarded by the transport
        self._release = release
        self._device = device
        self._lend = lend
        self._view: memoryview | None = None
        self._anchor: weakref.ref[ctypes.Array[ctypes.c_ubyte]] | None = None
        if device is None:
            anchor = (ctypes.c_ubyte * nbytes).from_address(address)
            self._anchor = weakref.ref(anchor)  # alive for as long as anything looks at the memory
            self._view = memoryview(anchor).cast("B")

    @property
    def device(self) -> int | None:
        """The number of the GPU whose memory this is; None is the host's."""
        return None if self._device is None else self._device.device

    def fetch(self, offsets: Sequence[int], size: int) -> memoryview:
        """Copies of ``size`` bytes from each offset, behind each other, wherever the region is.  Blocks; the caller sees to
        it that nobody writes meanwhile.  Raises TransportError where a GPU fails."""
        if self._device is not None:
            return self._device.fetch(offsets, size)
        return memoryview(b"".join(self.view[offset : offset + size] for offset in offsets))

    @property
    def view(self) -> memoryview:
        """All of it, writable bytes: np.frombuffer and torch.frombuffer take it without a copy.  Raises TransportError for
        a GPU's."""
        if self._device is not None:
            raise TransportError("a region of a GPU cannot be looked at from the host; fetch what is needed")
        if self._view is None:
            raise TransportClosed("the region was released")
        return self._view

    def lend(self) -> bytes:
        """What another process of this host and user needs to load and store in it (``transport.borrow``), for as long as
        the region is not released.  Raises TransportError where that cannot be."""
        if self._lend is None:
            raise TransportError("a region of this transport cannot be lent to other processes")
        return self._lend()

    def try_drop_view(self) -> bool:
        """For the transport: False while an array, a tensor or another view looks at the memory.  Of a GPU's, nobody knows:
        that is its owner's duty."""
        if self._anchor is None:
            return True
        self._view = None
        if self._anchor() is not None:
            gc.collect()
        anchor = self._anchor()
        if anchor is None:
            return True
        self._view = memoryview(anchor).cast("B")
        return False

    def release(self) -> None:
        """Gives the memory back; again does nothing.  Raises RegionBusy while a transfer of this process uses it or an
        array, a tensor or a slice over ``view`` lives.  That no peer writes any more cannot be seen from here and is the
        caller's duty: it would write into whatever comes here next."""
        self._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class RemoteRegion:
    """A peer's region, opened here.  A context manager."""

    def __init__(
        self,
        incarnation: int,
        nbytes: int,
        path: Path,
        close: Callable[[RemoteRegion], None],
        why_not_mapped: str = "",
    ) -> None:
        self.incarnation = incarnation
        self.nbytes = nbytes
        self.path = path
        self.why_not_mapped = why_not_mapped  # where the path is RMA
        self.num_in_flight = 0  # guarded by the transport
        self.closed = False  # guarded by the transport
        self._close = close

    def close(self) -> None:
        """Lets go of the peer's memory; again does nothing.  Raises RegionBusy while a transfer uses it."""
        self._close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Transport(Protocol):
    """``incarnation`` is random and new for every transport: peers tell a restarted process by it."""

    @property
    def name(self) -> str: ...

    @property
    def incarnation(self) -> int: ...

    def allocate(self, nbytes: int, device: int | None = None) -> Region:
        """Zeroed memory, of the host or of the GPU of that number.  Blocks while its pages are made, a quarter of a second
        for 4 GiB that the machine has at hand.  Raises OutOfMemory, and BackendUnavailable for a GPU that is not there."""
        ...

    def open(self, descriptor: bytes) -> RemoteRegion:
        """Maps the region, or else connects to its owner unless a connection is there; one serves all regions of a peer.
        Blocks for milliseconds, at most 2 s when an owner elsewhere does not answer, and holds up nobody else's
        opening.  Raises BadDescriptor, PeerLost.  Opening is dearer than posting: keep what is opened."""
        ...

    def post(self, op: Op, local: Region, remote: RemoteRegion, local_offsets: Offsets, remote_offsets: Offsets,
             sizes: Offsets | int) -> Transfer:  # fmt: skip
        """Starts one batch, in bytes, and returns, with it done already where it is small (up to 1 MiB of mapped memory);
        pieces move in any order.
        ``sizes`` may be one number for all.
        Several batches share the way in turns.  Neither region can be given up before the outcome was delivered.
        Raises OutOfBounds, TransportClosed, ValueError or TypeError, and nothing has moved then; all else fails the
        transfer."""
        ...

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on outcomes are delivered in ``loop``, called in its thread, save of what is done when ``post``
        returns.  One loop at a time."""
        ...

    def detach(self) -> None:
        """Undoes ``attach``, in the loop's thread, before the loop closes."""
        ...

    def poll(self, timeout_s: float) -> int:
        """Without a loop: delivers outcomes, waiting for the first up to ``timeout_s``; returns how many."""
        ...

    def fence(self, timeout_s: float) -> bool:
        """True once all that had reached this host, when it was called, lies in its region.  Of a writer of this host
        whose process has ended, no byte comes after.  Blocks, at most ``timeout_s``."""
        ...

    def pulse(self) -> int:
        """Grows twice a second or more often while the thread that moves the bytes goes on, also when there are none.  Does
        not wait; not for use while another thread closes.  Raises TransportError when that thread has ended: then no
        transfer ends any more, and calls here may block for ever."""
        ...

    def counters(self) -> Counters: ...

    def close(self) -> None:
        """Cuts transfers short (their futures get TransferCancelled or TransportClosed), drops connections, ends the
        thread, releases the regions; again does nothing.  Blocks, some seconds at worst if a peer does not answer.  Peers
        see PeerLost.  Memory that an array, tensor or view still looks at stays until the process ends: none can fault."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def _new_future() -> Future[TransferResult]:
    future: Future[TransferResult] = Future()
    future.set_running_or_notify_cancel()  # so that only the transport can end it
    return future


def _settle(future: Future[TransferResult], outcome: TransferResult | TransportError) -> None:
    if isinstance(outcome, TransferResult):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
