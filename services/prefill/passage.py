"""One prompt on a prefill worker: computed here, written into its owner's pool chunk by chunk, committed."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import grpc
import structlog

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import (
    AbortedError,
    DeadlineError,
    Error,
    InternalError,
    UnavailableError,
    from_rpc_error,
)
from services.engine.engine import StepTime
from services.engine.ready import Ready
from services.engine.sequence import ChunkComputed, Event, Sequence, Started, StepFailed, TokenDrawn
from services.prefill.arriving import Arriving
from services.prefill.conversion import laid_out
from services.prefill.ferry import Action, CancelWrites, Commit, Ferry, FerryState, Stopped, Write
from services.prefill.logbook import ChunkTimes, Logbook
from services.prefill.pieces import Pieces, Placement, pieces
from services.prefill.readiness import reached
from services.runtime import tracing
from services.runtime.place import Distance, Place, distance_between
from services.runtime.units import to_us
from services.worker.convert import to_pull_stats, to_token
from services.worker.pull_terms import PullReport
from services.worker.remotes import Owner
from transport import (
    Op,
    Path,
    PeerLost,
    Region,
    RemoteRegion,
    Transfer,
    TransferCancelled,
    TransportClosed,
    TransportError,
)

if TYPE_CHECKING:
    from services.prefill.ferries import Ferries

log = structlog.get_logger(__name__)

COMMIT_TIMEOUT_S = 10.0
ABORT_TIMEOUT_S = 5.0
MAX_CHUNKS_TOLD = 32


@dataclass(slots=True, eq=False)
class Passage:
    """One ticket's way from compute to commit: runs the pure ``Ferry`` against engine, transport and owner."""

    ferries: Ferries
    ticket: worker_pb2.Ticket
    sequence: Sequence
    ferry: Ferry
    target: Placement
    # One for each of the owner's ranks.
    remotes: list[RemoteRegion]
    owners: list[Owner]
    received_s: float
    pulled: PullReport | None = None
    outbox: asyncio.Queue[common_pb2.Token | worker_pb2.Committed | Error] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    # Events come from the engine's thread, which starts tasks that know of no request.
    request: tracing.Request = field(default_factory=tracing.Request.current)
    transfers: set[Transfer] = field(default_factory=set)
    source: Placement | None = None  # once compute has begun
    # Of each write, where the ticket asks for them.
    digests: list[asyncio.Future[list[int]]] = field(default_factory=list)
    logbook: Logbook = field(default_factory=Logbook)
    first_token: common_pb2.Token | None = None
    busy_s: float = 0.0
    num_bytes: int = 0
    path: str = ""
    verify_s: float = 0.0
    owner_lost: bool = False
    # Of a connection that broke, bytes may still be on their way: None where none did.
    arriving: Arriving | None = None

    @property
    def distance(self) -> Distance:
        """To the pool's owner."""
        return distance_between(Place.of(self.ferries.worker.labels), Place.of(self.ticket.owner_labels))

    @property
    def log(self) -> structlog.stdlib.BoundLogger:
        """Events come from the engine's thread and the transport's, which know of no request."""
        bound: structlog.stdlib.BoundLogger = log.bind(
            request_id=self.ticket.request_id, transfer_id=self.ticket.transfer_id
        )
        return bound

    def on_step(self, step: StepTime) -> None:
        self.logbook.computed(step.started_s, step.elapsed_s)

    def on_event(self, event: Event) -> None:
        match event:
            case Started(block_table=table, num_cached=num_cached, ready=ready):
                self.source = Placement(self.ferries.worker.layout, table)
                self._do(self.ferry.computed(num_cached), ready)
            case ChunkComputed(num_computed=num_computed, ready=ready):
                self._do(self.ferry.computed(num_computed), ready)
            case TokenDrawn(drawn=drawn):
                self.first_token = to_token(0, drawn)
                self.outbox.put_nowait(self.first_token)
                self._do(self.ferry.drawn())
            case StepFailed(message=message):
                self.outbox.put_nowait(InternalError(message))
                self._do(self.ferry.stop(message))

    def stop(self, reason: str) -> None:
        """Computes and writes no more; ``ended`` is set once that is certain.  Idempotent."""
        if self.ferry.state in (FerryState.WRITING, FerryState.COMMITTING):
            self.outbox.put_nowait(AbortedError(reason, reason="TRANSFER_STOPPED"))
        with self.ferries.worker.engine.exclusive(wake=False) as scheduler:
            if self.ferry.state is not FerryState.DONE:
                scheduler.halt(self.sequence.id)
        self._do(self.ferry.stop(reason))

    def _do(self, actions: list[Action], ready: Ready | None = None) -> None:
        """``ready``: when what is to be written is in the pool; None where it is."""
        for action in actions:
            match action:
                case Write():
                    self.ferries.tasks.spawn(self._write(action, ready))
                    if self.ticket.verify:  # while the bytes move
                        digest = self._digest(action) if ready is None else self._digest_once(ready, action)
                        self.digests.append(asyncio.ensure_future(digest))
                case Commit():
                    self.ferries.tasks.spawn(self._commit(action))
                case CancelWrites():
                    self.ferries.converter.withdraw(self)
                    for transfer in self.transfers:
                        transfer.cancel()
                case Stopped(reason=reason):
                    self._release()
                    self.ferries.tasks.spawn(self._tell_owner(reason))

    async def _write(self, write: Write, ready: Ready | None) -> None:
        """Tells the ferry when nothing is read or written for it any more."""
        worker, converter, target = self.ferries.worker, self.ferries.converter, self.target
        try:
            self.request.join()
            source = self.source
            assert source is not None, "compute begins before there is anything to write"
            if ready is not None:
                await reached(ready)
            if source.layout.dtype == target.layout.dtype:
                batches = pieces(source, target, write.first_token, write.end_token)
                await self._transfer(worker.regions, batches, write.num_blocks)
            else:
                for begin, end in converter.goes(target.layout, write.first_token, write.end_token):
                    self._require_going()
                    async with converter.converted(source, target.layout, begin, end, self) as scratch:
                        num_blocks = -(-(end - begin) // target.layout.block_size)
                        await self._transfer((converter.region,), pieces(scratch, target, begin, end), num_blocks)
        except Exception as e:
            self._write_failed(e)
            return
        worker.traffic.blocks_written += write.num_blocks
        self._do(self.ferry.written())

    async def _digest_once(self, ready: Ready, write: Write) -> list[int]:
        await reached(ready)
        return await self._digest(write)

    def _digest(self, write: Write) -> asyncio.Future[list[int]]:
        """Of the owner's blocks that the write fills, from what they are made of here."""
        source, layout = self.source, self.target.layout
        assert source is not None
        digester, num_prompt = self.ferries.digester, self.ticket.num_prompt_tokens
        first = write.first_token // layout.block_size
        if source.layout == layout:
            return digester.digest(tuple(source.blocks[first : first + write.num_blocks]), first, num_prompt)
        target = Placement(layout, range(write.num_blocks), write.first_token)
        make = partial(laid_out, self.ferries.worker.regions, source, target, write.end_token)
        return digester.digest_made(make, layout, write.num_blocks, first, num_prompt)

    async def _transfer(self, local: tuple[Region, ...], batches: list[Pieces], num_blocks: int) -> None:
        """Returns or raises when the transport has let go of all sides."""
        ways = [
            # Blocks of several ranks are counted once.
            self._send(local[batch.source_rank], batch, 0 if number else num_blocks)
            for number, batch in enumerate(batches)
        ]
        if len(ways) == 1:
            await ways[0]
            return
        failures = [failure for failure in await asyncio.gather(*ways, return_exceptions=True) if failure is not None]
        if failures:
            # One that was cancelled says less than what it was cancelled for.
            raise min(failures, key=lambda failure: isinstance(failure, TransferCancelled))

    async def _send(self, local: Region, batch: Pieces, num_blocks: int) -> None:
        self._require_going()
        remote = self.remotes[batch.target_rank]
        posting = self.logbook.posting(num_blocks, time.monotonic())
        offsets = (batch.source_offsets, batch.target_offsets, batch.sizes)
        transfer = self.ferries.worker.transport.post(Op.WRITE, local, remote, *offsets)
        self.transfers.add(transfer)
        try:
            with (
                self.ferries.worker.transferring(),
                tracing.tracer().start_as_current_span(
                    "kv_write", attributes={"kvferry.num_blocks": num_blocks}
                ) as span,
            ):
                result = await transfer
                span.set_attributes({"kvferry.num_bytes": result.nbytes, "kvferry.path": result.path.value})
        except TransportError as e:
            if remote.path is Path.RMA and not isinstance(e, TransferCancelled):
                self.arriving = Arriving()
            raise
        finally:
            self.transfers.discard(transfer)
        self.logbook.written(posting, result.queued_s, result.busy_s, result.nbytes)
        self.busy_s += result.busy_s
        self.num_bytes += result.nbytes
        self.path = result.path
        self.ferries.worker.traffic.bytes_written += result.nbytes
        self.ferries.worker.transfer_times.wrote(result.nbytes, result.busy_s, self.distance)

    def _require_going(self) -> None:
        if self.ferry.state is not FerryState.WRITING:
            raise TransferCancelled("stopped before it was sent")

    def _write_failed(self, failure: Exception) -> None:
        if isinstance(failure, PeerLost | TransportClosed):
            self.owner_lost = True
            for owner in self.owners:
                self.ferries.remotes.forget(owner)
        elif not isinstance(failure, TransferCancelled):
            self.log.error("write_failed", exc_info=failure)
        if self.ferry.state is FerryState.WRITING:
            self.outbox.put_nowait(_to_error(failure))
        self._do(self.ferry.write_failed(f"writing failed: {failure}"))

    async def _commit(self, written: Commit) -> None:
        ticket, identity = self.ticket, self.ferries.worker.identity
        assert self.first_token is not None
        self.request.join()
        digests = await self._collect_digests()
        if digests is None:
            return
        asked_s = time.monotonic()
        try:
            answer = await self._owner().CommitTransfer(
                worker_pb2.CommitTransferRequest(
                    transfer_id=ticket.transfer_id,
                    epoch=ticket.epoch,
                    owner_incarnation=ticket.owner_incarnation,
                    writer_id=identity.worker_id,
                    writer_incarnation=identity.incarnation,
                    num_blocks=written.num_blocks,
                    num_tokens=written.num_tokens,
                    num_bytes=self.num_bytes,
                    first_token=self.first_token,
                    block_digests=digests,
                ),
                timeout=COMMIT_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as e:
            error = from_rpc_error(e)
            self.log.warning("commit_refused", error=str(error))
            lost = isinstance(error, UnavailableError | DeadlineError)
            self.outbox.put_nowait(
                UnavailableError(f"the pool's owner was lost: {error}", reason="OWNER_LOST")
                if lost
                else AbortedError(f"the commit was refused: {error}", reason="COMMIT_REFUSED")
            )
            self._do(self.ferry.stop(str(error)))
            return
        if self.ferry.state is not FerryState.COMMITTING:
            return  # stopped meanwhile, and the owner told so
        self.verify_s += answer.verify_us / 1e6
        elapsed_s = time.monotonic() - asked_s - answer.verify_us / 1e6
        self.ferries.worker.transfer_times.answered(elapsed_s, self.distance)
        self.ferry.committed()
        self.outbox.put_nowait(self._committed(written.num_blocks))
        self._release()

    async def _collect_digests(self) -> list[int] | None:
        """Of all blocks, in order, none where the ticket asks for none.  None when the passage was stopped meanwhile: the
        blocks that were read may have been somebody else's by then."""
        began_s = time.monotonic()
        try:
            digests = [digest for part in await asyncio.gather(*self.digests) for digest in part]
        except Exception as e:
            self.log.exception("digest_failed")
            if self.ferry.state is FerryState.COMMITTING:
                self.outbox.put_nowait(AbortedError(f"KV blocks could not be digested: {e}", reason="WRITE_FAILED"))
            self._do(self.ferry.stop(f"digesting failed: {e}"))
            return None
        if self.ferry.state is not FerryState.COMMITTING:
            return None
        if self.ticket.verify:
            self.verify_s = time.monotonic() - began_s
        return digests

    async def _tell_owner(self, reason: str) -> None:
        """Best effort: an owner that does not hear of it asks by itself."""
        ticket, identity = self.ticket, self.ferries.worker.identity
        if self.owner_lost:
            return
        try:
            await self._owner().AbortTransfer(
                worker_pb2.AbortTransferRequest(
                    transfer_id=ticket.transfer_id,
                    epoch=ticket.epoch,
                    owner_incarnation=ticket.owner_incarnation,
                    writer_id=identity.worker_id,
                    writer_incarnation=identity.incarnation,
                    reason=reason,
                ),
                timeout=ABORT_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as e:
            self.log.info("abort_not_told", error=e.details())

    def _owner(self) -> worker_pb2_grpc.DecodeServiceAsyncStub:
        return worker_pb2_grpc.DecodeServiceStub(self.ferries.channels.get(self.ticket.owner_control_address))

    def _release(self) -> None:
        # Whoever waits for the end is told, whatever fails below.
        self.ended.set()
        self.ferries.forget(self)
        worker = self.ferries.worker
        worker.router.unsubscribe(self.sequence.id)
        for digest in self.digests:
            digest.cancel()
        with worker.engine.exclusive() as scheduler:
            scheduler.abort(self.sequence.id)
        for owner in self.owners:
            self.ferries.remotes.release(owner)

    def _committed(self, num_blocks: int) -> worker_pb2.Committed:
        now_s, sequence, logbook = time.monotonic(), self.sequence, self.logbook
        assert logbook.begun_s is not None
        return worker_pb2.Committed(
            prefill=common_pb2.PrefillStats(
                queue_us=to_us(logbook.begun_s - self.received_s - (self.pulled.elapsed_s if self.pulled else 0.0)),
                compute_us=to_us(logbook.compute_s),
                num_prompt_tokens=sequence.num_prompt,
                num_cached_tokens=sequence.num_cached,
                num_chunks=sequence.num_chunks,
                pull=to_pull_stats(self.pulled) if self.pulled else None,
            ),
            transfer=common_pb2.TransferStats(
                num_blocks=num_blocks,
                num_bytes=self.num_bytes,
                busy_us=to_us(self.busy_s),
                exposed_us=to_us(now_s - logbook.computed_s),
                path=self.path,
                verify_us=to_us(self.verify_s),
                num_hidden_bytes=logbook.num_hidden_bytes(),
                chunks=[_to_chunk_times(chunk, logbook.begun_s) for chunk in logbook.chunks(MAX_CHUNKS_TOLD)],
            ),
        )


def _to_chunk_times(chunk: ChunkTimes, begun_s: float) -> common_pb2.ChunkTimes:
    message = common_pb2.ChunkTimes(
        compute_begin_us=to_us(chunk.compute_s[0] - begun_s),
        compute_end_us=to_us(chunk.compute_s[1] - begun_s),
        num_blocks=chunk.num_blocks,
    )
    if chunk.write_s is not None:
        message.write_begin_us, message.write_end_us = (to_us(at_s - begun_s) for at_s in chunk.write_s)
    return message


def _to_error(failure: BaseException) -> Error:
    if isinstance(failure, PeerLost | TransportClosed):
        return UnavailableError(f"the pool's owner was lost: {failure}", reason="OWNER_LOST")
    return AbortedError(f"writing KV blocks failed: {failure}", reason="WRITE_FAILED")
