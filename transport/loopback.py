"""Within one process: the same semantics without UCX, to test what stands on a transport.  Closing one is its death."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from transport.base import Counters, Op, Path, Region, RemoteRegion, Transfer, TransferResult
from transport.completions import Completion, Completions
from transport.descriptor import Descriptor
from transport.errors import (
    BackendUnavailable,
    OutOfMemory,
    PeerLost,
    TransferCancelled,
    TransportClosed,
    TransportError,
)
from transport.pieces import Offsets, Pieces

PIECE_BYTES = 1 << 20  # a cancel, or a peer's death, takes effect between two
_IDLE_S = 0.5

_transports: weakref.WeakValueDictionary[int, LoopbackTransport] = weakref.WeakValueDictionary()


@dataclass(slots=True)
class _Job:
    cookie: int
    op: Op
    local: Region
    remote: RemoteRegion
    owner: LoopbackTransport
    target: Region
    num_blocks: int
    pieces: list[tuple[int, int, int]]
    posted_s: float = field(default_factory=time.monotonic)
    cancelled: bool = False


class LoopbackTransport:
    """See ``transport.base.Transport``.  One thread copies, a batch after the other."""

    name = "loopback"

    def __init__(self) -> None:
        self.incarnation = int.from_bytes(os.urandom(8), "little")
        self._memory: dict[int, tuple[Region, mmap.mmap]] = {}  # by base
        self._owners: dict[RemoteRegion, tuple[LoopbackTransport, Region]] = {}
        self._jobs: dict[int, _Job] = {}
        self._queue: deque[_Job | None] = deque()
        self._work = threading.Condition()
        self._ended: deque[Completion] = deque()
        self._completions = Completions(self._drain, self._cancel)
        self.closed = False
        self._num_turns = 0
        self._thread = threading.Thread(target=self._run, name="loopback-transport", daemon=True)
        self._thread.start()
        _transports[self.incarnation] = self

    def allocate(self, nbytes: int, device: int | None = None) -> Region:
        self._check_open()
        if device is not None:
            raise BackendUnavailable("the loopback transport has the host's memory only")
        if nbytes <= 0:
            raise ValueError(f"a region has at least one byte, not {nbytes}")
        try:
            memory = mmap.mmap(-1, nbytes)
        except (OSError, OverflowError) as e:
            raise OutOfMemory(f"{nbytes} bytes could not be mapped: {e}; make the region smaller") from e
        anchor = ctypes.c_ubyte.from_buffer(memory)
        base = ctypes.addressof(anchor)
        del anchor
        descriptor = Descriptor(self.name, self.incarnation, base, nbytes).pack()
        region = Region(base, nbytes, descriptor, self._release)
        self._memory[base] = (region, memory)
        return region

    def open(self, descriptor: bytes) -> RemoteRegion:
        d = Descriptor.unpack(descriptor, backend=self.name)
        self._check_open()
        owner = _transports.get(d.incarnation)
        region, _ = owner._memory.get(d.base, (None, None)) if owner is not None and not owner.closed else (None, None)
        if owner is None or region is None:
            raise PeerLost("the region's owner is gone")
        remote = RemoteRegion(d.incarnation, d.nbytes, Path.LOOPBACK, self._close_remote)
        self._owners[remote] = (owner, region)
        return remote

    def post(self, op: Op, local: Region, remote: RemoteRegion, local_offsets: Offsets, remote_offsets: Offsets,
             sizes: Offsets | int) -> Transfer:  # fmt: skip
        pieces = Pieces.of(local_offsets, remote_offsets, sizes)
        if error := pieces.out_of_bounds(local.nbytes, remote.nbytes):
            raise error

        return self._completions.start(op, local, remote, pieces, self._submit)

    def _submit(self, op: Op, local: Region, remote: RemoteRegion, pieces: Pieces, cookie: int) -> None:
        owner, target = self._owners[remote]
        self._jobs[cookie] = job = _Job(
            cookie, op, local, remote, owner, target, pieces.num_blocks, list(pieces.merged())
        )
        self._enqueue(job)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._check_open()
        self._completions.attach(loop)

    def detach(self) -> None:
        self._completions.detach()

    def poll(self, timeout_s: float) -> int:
        return self._completions.poll(timeout_s)

    def fence(self, timeout_s: float) -> bool:
        return True  # copies are made by their writer, and end with it

    def pulse(self) -> int:
        self._check_open()
        if not self._thread.is_alive():
            raise TransportError("the transport's thread has ended")
        return self._num_turns

    def counters(self) -> Counters:
        return self._completions.counters()

    def close(self) -> None:
        if not self._completions.stop():
            return
        self.closed = True
        for job in list(self._jobs.values()):
            job.cancelled = True
        self._enqueue(None)
        self._thread.join()
        self._completions.close()
        for region in self._completions.give_up_all(region for region, _ in self._memory.values()):
            self._unmap(region)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _enqueue(self, job: _Job | None) -> None:
        with self._work:
            self._queue.append(job)
            self._work.notify()

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._queue:
                    self._num_turns += 1
                    self._work.wait(_IDLE_S)
                self._num_turns += 1
                job = self._queue.popleft()
            if job is None:
                return
            self._ended.append(self._copy(job))
            os.eventfd_write(self._completions.event_fd, 1)

    def _copy(self, job: _Job) -> Completion:
        started_s = time.monotonic()
        nbytes, error = 0, self._obstacle(job)
        for here, there, size in job.pieces:
            for done in range(0, size, PIECE_BYTES):
                if (error := self._obstacle(job)) is not None:
                    break
                length = min(PIECE_BYTES, size - done)
                ours = slice(here + done, here + done + length)
                theirs = slice(there + done, there + done + length)
                try:
                    if job.op is Op.WRITE:
                        job.target.view[theirs] = job.local.view[ours]
                    else:
                        job.local.view[ours] = job.target.view[theirs]
                except (TransportClosed, ValueError):  # released by its owner at this moment
                    error = PeerLost("the region's owner is gone")
                    break
                nbytes += length
            if error is not None:
                break
        queued_s, busy_s = started_s - job.posted_s, time.monotonic() - started_s
        result = TransferResult(nbytes, job.num_blocks, len(job.pieces), queued_s, busy_s, Path.LOOPBACK)
        return Completion(job.cookie, error or result)

    def _obstacle(self, job: _Job) -> TransportError | None:
        if job.cancelled:
            return TransferCancelled("cancelled")
        if job.owner.closed or job.target.released:
            return PeerLost("the region's owner is gone")
        return None

    def _drain(self) -> list[Completion]:
        ended = [self._ended.popleft() for _ in range(len(self._ended))]
        for completion in ended:
            del self._jobs[completion.cookie]
        return ended

    def _cancel(self, cookie: int) -> None:
        self._jobs[cookie].cancelled = True

    def _release(self, region: Region) -> None:
        if not self.closed and self._completions.give_up(region):
            self._unmap(region)

    def _unmap(self, region: Region) -> None:
        _, memory = self._memory.pop(region.address)
        memory.close()

    def _close_remote(self, remote: RemoteRegion) -> None:
        if self._completions.give_up(remote):
            del self._owners[remote]

    def _check_open(self) -> None:
        if self.closed:
            raise TransportClosed("the transport was closed")
