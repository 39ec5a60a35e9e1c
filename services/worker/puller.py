"""Reads a prompt's cached blocks from the worker that holds them: pin, read, proof.  ``Puller._pull`` is the whole story.

Advice of a gateway and nothing more: whatever goes wrong, the caller computes what it did not get.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc
import structlog

from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import Error, from_rpc_error
from services.engine.blocks import OutOfBlocksError
from services.engine.hashing import extend_chain
from services.engine.sequence import Sequence
from services.runtime.channels import Channels
from services.runtime.tasks import Tasks
from services.worker.pull_terms import Outcome, PullReport, Source
from services.worker.pulls import Pull, TooManyPullsError, stood
from services.worker.remotes import Owner, Remotes
from services.worker.worker import Worker
from transport import Op, Path, RemoteRegion, Transfer, TransferResult, TransportError

log = structlog.get_logger(__name__)

T = TypeVar("T")

MAX_PULL_S = 10.0
MAX_WAITING = 256  # requests, for the pulls under way
RELEASE_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 5.0
# Over these, reading cannot harm the holder (ADR 1: a reader that dies in the middle of an emulated read over tcp can).
SAFE_PATHS = frozenset({Path.MAPPED, Path.LOOPBACK})


class _GivenUp(Exception):
    def __init__(self, outcome: Outcome, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class _End:
    outcome: Outcome
    result: TransferResult | None = None
    num_blocks: int = 0


@dataclass(slots=True, eq=False)
class _UnderWay:
    """``task`` never raises; cancelled, it leaves the pull to its last byte."""

    pull: Pull
    task: asyncio.Task[_End]
    num_waiting: int = 0


class Puller:
    """Use as an async context manager.  Owned by the event loop.  ``remotes`` are the role's too: a pool is opened once."""

    def __init__(self, worker: Worker, channels: Channels) -> None:
        self.remotes = Remotes(worker.transport)
        self._worker = worker
        self._channels = channels
        self._under_way: dict[Pull, _UnderWay] = {}
        self._num_waiting = 0
        self._tasks = Tasks()  # pulls, reads that go on after them, and messages to holders

    async def __aenter__(self) -> Puller:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stops what is under way, and waits for the last byte."""
        for under_way in list(self._under_way.values()):
            under_way.task.cancel()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._tasks.ended()
                await self.remotes.close()
        except TimeoutError:
            log.warning("pulls_do_not_end", tasks=len(self._tasks))
            self._tasks.cancel()

    async def pull(self, sequence: Sequence, source: Source) -> PullReport:
        """Returns when the blocks are cached here, or there is nothing more to wait for.  Whoever asks for blocks that are
        on their way shares their pull; it is stopped when the last one leaves.  Raises nothing but its cancellation."""
        began_s = time.monotonic()
        deadline_s = began_s + min(source.within_s or MAX_PULL_S, MAX_PULL_S)
        end = await self._wait_for(self._chain(sequence, source.num_blocks), source, deadline_s)
        elapsed_s = time.monotonic() - began_s
        traffic, result = self._worker.traffic, end.result
        traffic.pulls[end.outcome] += 1
        traffic.pull_s += elapsed_s
        return PullReport(
            source.worker_id,
            end.outcome,
            end.num_blocks,
            result.nbytes if result else 0,
            elapsed_s,
            result.busy_s if result else 0.0,
        )

    def _chain(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Without the prompt's last token, which is always computed.  The sequence keeps what is worked out."""
        block_size = self._worker.layout.block_size
        known = (len(sequence.chain) - 1) * block_size
        sequence.chain += extend_chain(sequence.chain[-1], sequence.tokens[known:], block_size)
        return sequence.chain[1 : 1 + min(num_blocks, (len(sequence.tokens) - 1) // block_size)]

    async def _wait_for(self, chain: list[bytes], source: Source, deadline_s: float) -> _End:
        if self._num_waiting >= MAX_WAITING:
            return _End(Outcome.BUSY)
        try:
            under_way = self._find_or_begin(chain, source, deadline_s)
        except TooManyPullsError:
            return _End(Outcome.BUSY)
        if under_way is None:
            return _End(Outcome.CACHED)
        self._num_waiting += 1
        under_way.num_waiting += 1
        try:
            await asyncio.wait((under_way.task,), timeout=deadline_s - time.monotonic())
            if not under_way.task.done():
                log.info("pull_given_up", holder=source.worker_id, outcome=Outcome.LATE.value)
                return _End(Outcome.LATE)
            return _End(Outcome.CANCELLED) if under_way.task.cancelled() else under_way.task.result()
        finally:
            self._num_waiting -= 1
            under_way.num_waiting -= 1
            if not under_way.num_waiting:
                under_way.task.cancel()

    def _find_or_begin(self, chain: list[bytes], source: Source, deadline_s: float) -> _UnderWay | None:
        """None: nothing is lacking."""
        with self._worker.engine.exclusive(wake=False):
            found = self._worker.pulls.find(chain)
            if found is not None and found in self._under_way:
                return self._under_way[found]
            pull = self._worker.pulls.begin(chain)
        if pull is None:
            return None
        task = self._tasks.spawn(self._run(pull, source, deadline_s))
        under_way = self._under_way[pull] = _UnderWay(pull, task)

        def ended(_: asyncio.Task[_End]) -> None:  # also of a task that was cancelled before it began
            del self._under_way[pull]
            self._change(self._worker.pulls.stop, pull)

        task.add_done_callback(ended)
        return under_way

    async def _run(self, pull: Pull, source: Source, deadline_s: float) -> _End:
        try:
            return await self._pull(pull, source, deadline_s)
        except _GivenUp as e:
            log.info("pull_given_up", holder=source.worker_id, outcome=e.outcome.value, why=str(e))
            return _End(e.outcome)
        except Exception:
            log.exception("pull_failed", holder=source.worker_id)
            return _End(Outcome.FAILED)

    async def _pull(self, pull: Pull, source: Source, deadline_s: float) -> _End:
        worker, began_s = self._worker, time.monotonic()
        if self.remotes.is_unmapped(_owner(source)):
            raise _GivenUp(Outcome.UNSAFE, "its pool is not in memory that this process has mapped")
        pin = await self._pin(pull, source, deadline_s - began_s)
        try:
            self._require_alike(pin)
            opening_s = time.monotonic()
            remote = await self._open(_owner(source), pin)
            opening_s = time.monotonic() - opening_s
            result = await self._read(pull, _owner(source), pin, remote)
            read_s = time.monotonic()
        except BaseException:
            self._tasks.spawn(self._release(pin.pin_id, source))
            raise
        held = await self._release(pin.pin_id, source)
        if not stood(held, read_ended_s=read_s, lease_ends_s=began_s + pin.expires_in_ms / 1000):
            raise _GivenUp(Outcome.UNPROVEN, "the pin did not stand until the last byte had arrived")
        self._change(worker.pulls.conclude, pull)
        worker.traffic.blocks_pulled += len(pull.blocks)
        worker.traffic.bytes_pulled += result.nbytes
        elapsed_s = time.monotonic() - began_s
        worker.pull_times.pulled(result.nbytes, result.busy_s, elapsed_s - opening_s - result.busy_s)
        log.info(
            "pulled", holder=source.worker_id, blocks=len(pull.blocks), bytes=result.nbytes, path=result.path.value,
            elapsed_us=round(elapsed_s * 1e6), busy_us=round(result.busy_s * 1e6), held=held,
        )  # fmt: skip
        return _End(Outcome.PULLED, result, len(pull.blocks))

    async def _pin(self, pull: Pull, source: Source, lifetime_s: float) -> worker_pb2.PinBlocksResponse:
        identity = self._worker.identity
        try:
            pin: worker_pb2.PinBlocksResponse = await self._holder(source).PinBlocks(
                worker_pb2.PinBlocksRequest(
                    hashes=b"".join(pull.lacking),
                    lifetime_ms=max(1, int(lifetime_s * 1000)),
                    reader_id=identity.worker_id,
                    reader_incarnation=identity.incarnation,
                    owner_incarnation=source.incarnation,
                ),
                timeout=MAX_PULL_S,
            )
        except grpc.aio.AioRpcError as e:
            error = from_rpc_error(e)
            lost = e.code() in _NO_ANSWER and error.reason == type(error).default_reason
            raise _GivenUp(Outcome.LOST if lost else Outcome.REFUSED, str(error)) from e
        if not pin.pin_id:
            raise _GivenUp(Outcome.GONE, "it holds none of the blocks any more")
        return pin

    def _require_alike(self, pin: worker_pb2.PinBlocksResponse) -> None:
        layout = self._worker.layout
        if pin.layout.fingerprint != layout.fingerprint:
            raise _GivenUp(
                Outcome.UNLIKE,
                f"its blocks are of {pin.layout.block_size_tokens} tokens in {pin.layout.dtype}, ours of "
                f"{layout.block_size} in {layout.dtype}, or of another model",
            )
        if len(set(pin.blocks)) < len(pin.blocks):
            raise _GivenUp(Outcome.UNLIKE, "it named one block twice")

    async def _open(self, owner: Owner, pin: worker_pb2.PinBlocksResponse) -> RemoteRegion:
        """Whoever reads it, or does not, gives it back."""
        try:
            remote = await self.remotes.acquire(owner, pin.region)
        except Error as e:
            raise _GivenUp(Outcome.LOST, str(e)) from e
        if remote.path in SAFE_PATHS:
            return remote
        self.remotes.release(owner)
        raise _GivenUp(Outcome.UNSAFE, f"its pool is not mapped here: {remote.why_not_mapped}")

    async def _read(
        self, pull: Pull, owner: Owner, pin: worker_pb2.PinBlocksResponse, remote: RemoteRegion
    ) -> TransferResult:
        """Cancelled, it stops the read, and leaves blocks and region to whoever sees its end."""
        try:
            transfer = self._post(pull, pin, remote)
        except BaseException:
            self.remotes.release(owner)
            raise
        try:
            with self._worker.transferring():
                return await transfer
        except asyncio.CancelledError:
            transfer.cancel()
            raise
        except TransportError as e:
            self.remotes.forget(owner)
            raise _GivenUp(Outcome.LOST, f"reading ended early: {e}") from e
        finally:
            if transfer.done:
                self._read_ended(pull, owner)
            else:
                self._tasks.spawn(self._see_to_the_end(transfer, pull, owner))

    def _post(self, pull: Pull, pin: worker_pb2.PinBlocksResponse, remote: RemoteRegion) -> Transfer:
        worker, nbytes = self._worker, self._worker.layout.block_nbytes
        with worker.engine.exclusive(wake=False) as scheduler:
            count = min(len(pin.blocks), len(pull.lacking), scheduler.num_spare_blocks)
            if not count:
                raise _GivenUp(Outcome.NO_ROOM, "whoever runs or waits here needs all blocks")
            try:
                ours = worker.pulls.lend(pull, count)
            except OutOfBlocksError as e:
                raise _GivenUp(Outcome.NO_ROOM, str(e)) from e
        here, there = [b * nbytes for b in ours], [b * nbytes for b in pin.blocks[:count]]
        try:
            return worker.transport.post(Op.READ, worker.region, remote, here, there, nbytes)
        except BaseException as e:
            self._change(worker.pulls.read_ended, pull)  # nothing has moved
            if isinstance(e, TransportError):
                raise _GivenUp(Outcome.LOST, f"nothing could be read: {e}") from e
            raise

    async def _see_to_the_end(self, transfer: Transfer, pull: Pull, owner: Owner) -> None:
        """Of a read that was told to stop."""
        try:
            await transfer
        except TransportError as e:
            log.debug("read_stopped", holder=owner.worker_id, how=str(e))
        finally:
            if transfer.done:  # else the process is at its end, and the blocks stay where they are
                self._read_ended(pull, owner)

    def _read_ended(self, pull: Pull, owner: Owner) -> None:
        self._change(self._worker.pulls.read_ended, pull)
        self.remotes.release(owner)

    async def _release(self, pin_id: str, source: Source) -> bool | None:
        """What the holder says of the pin; None when it says nothing."""
        identity = self._worker.identity
        try:
            answer = await self._holder(source).ReleasePin(
                worker_pb2.ReleasePinRequest(
                    pin_id=pin_id,
                    reader_id=identity.worker_id,
                    reader_incarnation=identity.incarnation,
                    owner_incarnation=source.incarnation,
                ),
                timeout=RELEASE_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as e:
            log.info("pin_not_released", holder=source.worker_id, error=e.details())
            return None if e.code() in _NO_ANSWER else False
        return bool(answer.held)

    def _holder(self, source: Source) -> worker_pb2_grpc.WorkerServiceAsyncStub:
        return worker_pb2_grpc.WorkerServiceStub(self._channels.get(source.control_address))

    def _change(self, change: Callable[[Pull], T], pull: Pull) -> T:
        """Blocks may have come back by it: for those who run or wait, and for a drain."""
        with self._worker.engine.exclusive():
            changed = change(pull)
        self._worker.router.changed.set()
        return changed


def _owner(source: Source) -> Owner:
    return Owner(source.worker_id, source.incarnation)


_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
