"""From the backend's thread to whoever waits: the transfers under way and the delivery of their outcomes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from transport.base import Counters, Op, Region, RemoteRegion, Transfer, TransferResult
from transport.errors import RegionBusy, TransferCancelled, TransportClosed, TransportError
from transport.pieces import Pieces

Outcome = TransferResult | TransportError


class Completion(NamedTuple):
    """What the backend says of the transfer ``cookie``."""

    cookie: int
    outcome: Outcome


Submit = Callable[[Op, Region, RemoteRegion, Pieces, int], Outcome | None]  # the last is the cookie


@dataclass(frozen=True, slots=True)
class _Pending:
    transfer: Transfer
    op: Op
    local: Region
    remote: RemoteRegion


class Completions:
    """``drain`` returns what has ended since the last time and is called with ``lock`` held; the backend makes
    ``event_fd`` readable when there is something to drain.  ``lock`` also guards the regions' use: hold it only for
    moments."""

    def __init__(self, drain: Callable[[], list[Completion]], cancel: Callable[[int], None]) -> None:
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._drain = drain
        self._cancel = cancel
        self._lock = threading.Lock()
        self._turn = threading.Condition()  # who waits for the event_fd: one thread at a time
        self._leader: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: dict[int, _Pending] = {}
        self._next_cookie = 1
        self._counters = Counters()
        self._stopping = False
        self._closed = False

    def start(self, op: Op, local: Region, remote: RemoteRegion, pieces: Pieces, submit: Submit) -> Transfer:
        """Enters a transfer and hands it to the backend by ``submit``, which may not block; it returns the outcome of what
        was done at once.  What stands here costs a small transfer more than its bytes do."""
        with self._lock:
            if self._stopping or local.released or remote.closed:
                what = "transport" if self._stopping else "region" if local.released else "remote region"
                raise TransportClosed(f"the {what} was closed before the transfer was posted")
            cookie = self._next_cookie
            outcome = submit(op, local, remote, pieces, cookie)  # it cannot be delivered before the lock is let go
            self._next_cookie = cookie + 1
            self._counters.num_posted += 1
            if outcome is not None:
                self._count(op, outcome)
                return Transfer(_nothing, self._wait, outcome)
            transfer = Transfer(lambda: self._cancel_one(cookie), self._wait)
            self._pending[cookie] = _Pending(transfer, op, local, remote)
            local.num_in_flight += 1
            remote.num_in_flight += 1
            return transfer

    def give_up(self, thing: Region | RemoteRegion) -> bool:
        """Marks a region released or a remote one closed; False when it already was.  Raises RegionBusy."""
        with self._lock:
            gone = thing.released if isinstance(thing, Region) else thing.closed
            if gone:
                return False
            if thing.num_in_flight:
                raise RegionBusy(
                    f"{thing.num_in_flight} transfers still use the region; cancel them or await their end"
                )
            if isinstance(thing, RemoteRegion):
                thing.closed = True
                return True
            if not thing.try_drop_view():
                raise RegionBusy("an array, tensor or slice over the region's view is still alive; drop it first")
            thing.released = True
            return True

    def give_up_all(self, regions: Iterable[Region]) -> list[Region]:
        """At the end: marks every region released, and returns those that nobody looks at."""
        with self._lock:
            unseen = []
            for region in regions:
                if not region.released and region.try_drop_view():
                    unseen.append(region)
                region.released = True
            return unseen

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None:
            raise ValueError("the transport is attached to a loop already; detach it first")
        loop.add_reader(self.event_fd, self.deliver)
        self._loop = loop

    def detach(self) -> None:
        loop, self._loop = self._loop, None
        if loop is None or loop.is_closed():
            return
        if _running_loop() is loop or not loop.is_running():
            loop.remove_reader(self.event_fd)
        else:
            removed = threading.Event()

            def remove() -> None:
                loop.remove_reader(self.event_fd)
                removed.set()

            loop.call_soon_threadsafe(remove)
            removed.wait(5)

    def deliver(self) -> int:
        """Resolves the futures of what has ended; returns how many."""
        resolved: list[tuple[Transfer, Outcome]] = []
        with self._lock:
            if self._closed:
                return 0
            for cookie, outcome in self._drain():
                pending = self._pending.pop(cookie)
                pending.local.num_in_flight -= 1
                pending.remote.num_in_flight -= 1
                self._count(pending.op, outcome)
                resolved.append((pending.transfer, outcome))
        for transfer, outcome in resolved:
            transfer.end(outcome)
        return len(resolved)

    def poll(self, timeout_s: float) -> int:
        if self._loop is not None:
            raise ValueError("the transport is attached to a loop, which delivers; await the transfers there")
        return self._poll(timeout_s, lambda: False)

    def counters(self) -> Counters:
        with self._lock:
            return dataclasses.replace(self._counters, bytes_by_path=dict(self._counters.bytes_by_path))

    def stop(self) -> bool:
        """Refuses new transfers.  False when it already did."""
        with self._lock:
            stopped, self._stopping = self._stopping, True
            return not stopped

    def close(self) -> None:
        """After the backend has ended every transfer: delivers what is left and lets waiting threads go."""
        self.detach()
        self.deliver()
        with self._lock:
            self._closed = True
            assert not self._pending, "the backend ends every transfer before it closes"
        os.eventfd_write(self.event_fd, 1)
        with self._turn:
            while self._leader not in (None, threading.get_ident()):
                self._turn.wait()
            os.close(self.event_fd)

    def _cancel_one(self, cookie: int) -> None:
        with self._lock:
            if cookie in self._pending and not self._stopping:
                self._cancel(cookie)

    def _wait(self, transfer: Transfer, timeout_s: float) -> None:
        loop = self._loop
        if loop is None:
            deadline = time.monotonic() + timeout_s
            while not transfer.future.done() and (left_s := deadline - time.monotonic()) > 0:
                self._poll(left_s, transfer.future.done)
        elif _running_loop() is loop and not transfer.future.done():
            raise RuntimeError("waiting here would block the loop that delivers the outcome; await the transfer")
        else:
            transfer.future.exception(timeout_s)

    def _poll(self, timeout_s: float, is_done: Callable[[], bool]) -> int:
        """Leads or follows: one thread waits for the event_fd and delivers for all, the others wait for their turn."""
        deadline = time.monotonic() + timeout_s
        num_delivered = 0
        while not self._closed and not num_delivered and not is_done():
            left_s = deadline - time.monotonic()
            with self._turn:
                if self._leader is not None:
                    if left_s <= 0 or not self._turn.wait(left_s):
                        break
                    continue
                self._leader = threading.get_ident()
            try:
                poller = select.poll()
                poller.register(self.event_fd, select.POLLIN)
                readable = poller.poll(max(0.0, left_s) * 1000)
                num_delivered = self.deliver() if readable else 0
            finally:
                with self._turn:
                    self._leader = None
                    self._turn.notify_all()
            if left_s <= 0:
                break
        return num_delivered

    def _count(self, op: Op, outcome: Outcome) -> None:
        counters = self._counters
        if isinstance(outcome, TransferResult):
            counters.num_succeeded += 1
            counters.num_pieces += outcome.num_pieces
            if op is Op.WRITE:
                counters.bytes_written += outcome.nbytes
            else:
                counters.bytes_read += outcome.nbytes
            counters.bytes_by_path[outcome.path] = counters.bytes_by_path.get(outcome.path, 0) + outcome.nbytes
        elif isinstance(outcome, TransferCancelled):
            counters.num_cancelled += 1
        else:
            counters.num_failed += 1


def _nothing() -> None:
    """How what has ended is cancelled."""


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
