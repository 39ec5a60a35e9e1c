"""A worker's side of the directory: its lease, its load, and what its prefix cache holds."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Self

import grpc
import structlog

from kvferry.api.directory.v1 import directory_pb2
from services.runtime.backoff import Backoff
from services.runtime.directories import Directories, Directory
from services.runtime.fence import Fence
from services.runtime.journal import BlockJournal, snapshot_events
from services.runtime.tier import Tier
from services.runtime.tls import Certificates

_log = structlog.stdlib.get_logger(__name__)

_CALL_TIMEOUT_S = 5.0
_DEREGISTER_TIMEOUT_S = 1.0
_HASHES_PER_CALL = 1 << 16  # 1 MiB
_LOOKS_PER_LEASE = 12
_REFUSALS = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED})


class _LeaseLostError(Exception):
    """The directory does not know the lease (any more)."""


class _ReplacedError(Exception):
    """Another process has taken this worker's id."""


class Membership:
    """Keeps a worker in the cluster while entered, for as long as the process lives.

    Registers, keeps the lease alive every third of ``lease_ttl_s`` with the current ``load()``, and publishes block
    events in order.  While the directory is away it tries again for ever with a capped, jittered backoff, one after the
    other where there are several, and the worker does not notice; when the lease has ended meanwhile it registers again
    and sends ``snapshot()``, by tier the hashes of all blocks now in the prefix cache.  Leaving deregisters (at most 1 s).
    Only when another process has registered under the same worker_id does it give up, with an error in the log.

    ``load`` and ``snapshot`` are called on the event loop's thread and must not block.  ``on_slept`` is called there, once,
    with how many seconds the process, or its event loop, was stopped when its lease ended meanwhile: others have given it
    up, and it should end at once.
    ``stored``, ``removed`` and ``cleared`` may be called from any thread, at any time, and never block.  Call them after
    the cache has changed: a snapshot may be taken in between.  When more than ``max_pending_hashes`` wait for a slow
    directory they are dropped and a snapshot is sent instead.
    """

    def __init__(
        self,
        directory_addresses: tuple[str, ...],
        info: directory_pb2.WorkerInfo,
        load: Callable[[], directory_pb2.WorkerLoad],
        snapshot: Callable[[], Mapping[Tier, Sequence[bytes]]],
        *,
        lease_ttl_s: float = 6.0,
        max_pending_hashes: int = 1 << 18,
        certificates: Certificates | None = None,
        on_slept: Callable[[float], None] = lambda slept_s: None,
    ) -> None:
        self._directories = Directories(directory_addresses, certificates=certificates)
        self._on_slept = on_slept
        self._fence = Fence(time.monotonic())
        self._info = info
        self._load = load
        self._snapshot = snapshot
        self._lease_ttl_s = lease_ttl_s
        self._journal = BlockJournal(max_pending_hashes)
        self._lease_id: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._away = False
        self._next_info: directory_pb2.WorkerInfo | None = None

    @property
    def registered(self) -> bool:
        """Whether the directory held a lease when last heard from."""
        return self._lease_id is not None

    def stored(self, hashes: Sequence[bytes], tier: Tier = Tier.DEVICE) -> None:
        """These blocks (chain hashes, 16 bytes each) are in this tier of the prefix cache now."""
        self._journal.stored(hashes, tier)
        self._wake()

    def removed(self, hashes: Sequence[bytes], tier: Tier = Tier.DEVICE) -> None:
        """These blocks are in this tier of the prefix cache no more."""
        self._journal.removed(hashes, tier)
        self._wake()

    def cleared(self) -> None:
        """The prefix cache is empty."""
        self._journal.cleared()
        self._wake()

    def report(self) -> None:
        """The load is told now, not with the next keep-alive.  Of the event loop, while entered."""
        self._report_due.set()

    async def describe(self, info: directory_pb2.WorkerInfo) -> None:
        """From now on the worker is ``info``, of the same incarnation: it leaves and registers again, with all its blocks.
        Returns when a directory knows; who stops waiting stops nothing else.  Of the event loop, while entered."""
        self._next_info = info
        self._described.clear()
        self._changed.set()
        await self._described.wait()

    async def __aenter__(self) -> Self:
        await self._directories.__aenter__()
        self._pending, self._report_due = asyncio.Event(), asyncio.Event()
        self._changed, self._described = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._tasks = (
            asyncio.create_task(self._stay(), name="membership"),
            asyncio.create_task(self._look_for_sleep(), name="membership fence"),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._loop = None
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        if self._lease_id is not None:
            request = directory_pb2.DeregisterRequest(lease_id=self._lease_id)
            try:
                await self._directories.current.stub.Deregister(request, timeout=_DEREGISTER_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                _log.info("left without saying goodbye; the lease will run out", code=error.code().name)
            self._lease_id = None
        await self._directories.__aexit__(None, None, None)

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None and not self._pending.is_set():
            try:
                loop.call_soon_threadsafe(self._pending.set)
            except RuntimeError:
                # The loop has been closed by a shutdown that this thread has not noticed yet.
                return

    async def _look_for_sleep(self) -> None:
        while True:
            await asyncio.sleep(self._lease_ttl_s / _LOOKS_PER_LEASE)
            if (slept_s := self._fence.awake(time.monotonic())) is not None:
                self._on_slept(slept_s)
                return

    async def _stay(self) -> None:
        failures = Backoff(initial_s=1.0, cap_s=30.0)
        while True:
            try:
                await self._register()
                if self._next_info is None:
                    self._described.set()
                await self._hold_lease()
                await self._leave()  # to come back as another
            except _LeaseLostError:
                _log.warning("the directory ended the lease; registering again", worker_id=self._info.worker_id)
            except _ReplacedError as error:
                _log.error("out of the cluster", worker_id=self._info.worker_id, reason=str(error))
                self._lease_id = None
                return
            except Exception:
                # A bug, perhaps in load() or snapshot(); a worker that still serves must not drop out for good.
                _log.exception("membership failed; registering again", worker_id=self._info.worker_id)
                await asyncio.sleep(failures.next_s())
            self._lease_id = None

    async def _register(self) -> None:
        backoff = Backoff()
        while True:
            request = directory_pb2.RegisterRequest(
                info=self._info, load=self._load(), lease_ttl_ms=round(self._lease_ttl_s * 1000)
            )
            directory = self._directories.current
            asked_s = time.monotonic()
            try:
                response = await directory.stub.Register(request, timeout=_CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    raise _ReplacedError(error.details()) from error
                await self._pause(backoff, directory, "register", error)
                continue
            self._lease_id = response.lease_id
            self._fence.granted(asked_s, self._lease_ttl_s)
            self._journal.break_()
            self._pending.set()
            self._away = False
            _log.info("registered", worker_id=self._info.worker_id, directory=directory.address)
            return

    async def _leave(self) -> None:
        """Waits for the answer: what a directory knows of an incarnation cannot change under its lease."""
        assert self._lease_id is not None
        assert self._next_info is not None
        backoff = Backoff()
        while True:
            directory = self._directories.current
            try:
                request = directory_pb2.DeregisterRequest(lease_id=self._lease_id)
                await directory.stub.Deregister(request, timeout=_CALL_TIMEOUT_S)
                break
            except grpc.aio.AioRpcError as error:
                await self._pause(backoff, directory, "deregister", error)
        self._changed.clear()
        self._info, self._next_info = self._next_info, None

    async def _hold_lease(self) -> None:
        """Until the worker is described anew; raises what ends the lease before."""
        keep_alive = asyncio.create_task(self._keep_alive(), name="membership keep-alive")
        publish = asyncio.create_task(self._publish(), name="membership publish")
        changed = asyncio.create_task(self._changed.wait(), name="membership changed")
        tasks = (keep_alive, publish, changed)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _keep_alive(self) -> None:
        assert self._lease_id is not None
        ttl_s, backoff = self._lease_ttl_s, Backoff()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(ttl_s / 3):
                    await self._report_due.wait()
            self._report_due.clear()
            request = directory_pb2.KeepAliveRequest(lease_id=self._lease_id, load=self._load())
            while True:
                directory = self._directories.current
                asked_s = time.monotonic()
                try:
                    response = await directory.stub.KeepAlive(request, timeout=min(_CALL_TIMEOUT_S, ttl_s / 3))
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.NOT_FOUND:
                        raise _LeaseLostError from error
                    await self._pause(backoff, directory, "keep-alive", error)
                else:
                    ttl_s = response.lease_ttl_ms / 1000
                    self._fence.granted(asked_s, ttl_s)
                    self._answered(directory)
                    backoff.reset()
                    break

    async def _publish(self) -> None:
        next_sequence = 1
        while True:
            await self._pending.wait()
            self._pending.clear()
            while True:
                if self._journal.broken:
                    self._journal.mend()
                    events = snapshot_events(self._snapshot(), _HASHES_PER_CALL)
                    batches: Iterable[list[directory_pb2.BlockEvent]] = [[event] for event in events]
                elif events := self._journal.take(_HASHES_PER_CALL):
                    batches = [events]
                else:
                    break
                next_sequence = await self._send(deque(batches), next_sequence)

    async def _send(self, batches: deque[list[directory_pb2.BlockEvent]], next_sequence: int) -> int:
        """Sends ``batches`` in order; returns early when the journal breaks, since a snapshot then says it all."""
        assert self._lease_id is not None
        backoff = Backoff()
        while batches and not self._journal.broken:
            request = directory_pb2.PublishBlocksRequest(
                lease_id=self._lease_id, first_sequence=next_sequence, events=batches[0]
            )
            directory = self._directories.current
            try:
                # Sent again after a lost answer, to whichever directory, the events are known by their numbers.
                response = await directory.stub.PublishBlocks(request, timeout=_CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise _LeaseLostError from error
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    self._journal.break_()
                else:
                    await self._pause(backoff, directory, "publish", error)
                continue
            next_sequence = response.next_sequence
            self._answered(directory)
            backoff.reset()
            batches.popleft()
        return next_sequence

    def _answered(self, directory: Directory) -> None:
        if self._away:
            self._away = False
            _log.info("a directory answers again", directory=directory.address)

    async def _pause(self, backoff: Backoff, directory: Directory, what: str, error: grpc.aio.AioRpcError) -> None:
        """Waits before the next attempt, at another directory if there is one; or raises ``error`` when the directory has
        understood and refused."""
        if error.code() in _REFUSALS:
            raise error
        self._directories.move_on(directory)
        if not self._away:
            self._away = True
            _log.warning(
                "the directory does not answer; trying until one does",
                call=what, code=error.code().name, directory=directory.address,
            )  # fmt: skip
        await asyncio.sleep(backoff.next_s())
