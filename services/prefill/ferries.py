"""Prompts on a prefill worker: computed here, written into their owners' pools chunk by chunk, committed."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import structlog

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import (
    AbortedError,
    ConflictError,
    DeadlineError,
    Error,
    InternalError,
    UnavailableError,
    from_rpc_error,
)
from services.engine.engine import StepTime
from services.engine.sequence import ChunkComputed, Event, Sequence, Started, StepFailed, TokenDrawn
from services.prefill.conversion import Converter, laid_out
from services.prefill.ferry import Action, CancelWrites, Commit, Ferry, FerryState, Stopped, Write
from services.prefill.logbook import ChunkTimes, Logbook
from services.prefill.pieces import Pieces, Placement, pieces
from services.prefill.remotes import Owner, Remotes
from services.runtime.channels import Channels
from services.worker.convert import to_peer_layout, to_token, to_us
from services.worker.digester import Digester
from services.worker.worker import Worker
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

log = structlog.get_logger(__name__)

COMMIT_TIMEOUT_S = 10.0
ABORT_TIMEOUT_S = 5.0
REMEMBER_USED = 16384
MAX_CHUNKS_TOLD = 32


@dataclass(slots=True, eq=False)
class Passage:
    """One ticket's way from compute to commit: runs the pure ``Ferry`` against engine, transport and owner."""

    ferries: Ferries
    ticket: worker_pb2.Ticket
    sequence: Sequence
    ferry: Ferry
    target: Placement
    remote: RemoteRegion
    owner: Owner
    received_s: float
    outbox: asyncio.Queue[common_pb2.Token | worker_pb2.Committed | Error] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
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
    # Of a connection that broke, bytes may still be on their way.
    may_still_arrive: bool = False

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
            case Started(block_table=table, num_cached=num_cached):
                self.source = Placement(self.ferries.worker.layout, table)
                self._do(self.ferry.computed(num_cached))
            case ChunkComputed(num_computed=num_computed):
                self._do(self.ferry.computed(num_computed))
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

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Write():
                    self.ferries.spawn(self._write(action))
                    if self.ticket.verify:  # while the bytes move
                        self.digests.append(self._digest(action))
                case Commit():
                    self.ferries.spawn(self._commit(action))
                case CancelWrites():
                    self.ferries.converter.withdraw(self)
                    for transfer in self.transfers:
                        transfer.cancel()
                case Stopped(reason=reason):
                    self._release()
                    self.ferries.spawn(self._tell_owner(reason))

    async def _write(self, write: Write) -> None:
        """Tells the ferry when nothing is read or written for it any more."""
        worker, converter, target = self.ferries.worker, self.ferries.converter, self.target
        source = self.source
        assert source is not None, "compute begins before there is anything to write"
        try:
            if source.layout.dtype == target.layout.dtype:
                batch = pieces(source, target, write.first_token, write.end_token)
                await self._transfer(worker.region, batch, write.num_blocks)
            else:
                for begin, end in converter.goes(target.layout, write.first_token, write.end_token):
                    self._require_going()
                    async with converter.converted(source, target.layout, begin, end, self) as scratch:
                        num_blocks = -(-(end - begin) // target.layout.block_size)
                        await self._transfer(converter.region, pieces(scratch, target, begin, end), num_blocks)
        except Exception as e:
            self._write_failed(e)
            return
        worker.traffic.blocks_written += write.num_blocks
        self._do(self.ferry.written())

    def _digest(self, write: Write) -> asyncio.Future[list[int]]:
        """Of the owner's blocks that the write fills, from what they are made of here."""
        source, layout = self.source, self.target.layout
        assert source is not None
        digester, num_prompt = self.ferries.digester, self.ticket.num_prompt_tokens
        first = write.first_token // layout.block_size
        if source.layout == layout:
            return digester.digest(tuple(source.blocks[first : first + write.num_blocks]), first, num_prompt)
        target = Placement(layout, range(write.num_blocks), write.first_token)
        make = partial(laid_out, self.ferries.worker.region, source, target, write.end_token)
        return digester.digest_made(make, layout, write.num_blocks, first, num_prompt)

    async def _transfer(self, local: Region, batch: Pieces, num_blocks: int) -> None:
        """Returns or raises when the transport has let go of both sides."""
        self._require_going()
        transport = self.ferries.worker.transport
        offsets = (batch.source_offsets, batch.target_offsets, batch.sizes)
        posting = self.logbook.posting(num_blocks, time.monotonic())
        transfer = transport.post(Op.WRITE, local, self.remote, *offsets)
        self.transfers.add(transfer)
        try:
            result = await transfer
        except TransportError as e:
            # Of a connection that broke, only the writer's end can prove that nothing comes any more.
            if self.remote.path is Path.RMA and not isinstance(e, TransferCancelled):
                self.may_still_arrive = True
            raise
        finally:
            self.transfers.discard(transfer)
        self.logbook.written(posting, result.queued_s, result.busy_s, result.nbytes)
        self.busy_s += result.busy_s
        self.num_bytes += result.nbytes
        self.path = result.path.name.lower()
        self.ferries.worker.traffic.bytes_written += result.nbytes

    def _require_going(self) -> None:
        if self.ferry.state is not FerryState.WRITING:
            raise TransferCancelled("stopped before it was sent")

    def _write_failed(self, failure: Exception) -> None:
        if isinstance(failure, PeerLost | TransportClosed):
            self.owner_lost = True
            self.ferries.remotes.forget(self.owner)
        elif not isinstance(failure, TransferCancelled):
            self.log.error("write_failed", exc_info=failure)
        if self.ferry.state is FerryState.WRITING:
            self.outbox.put_nowait(_to_error(failure))
        self._do(self.ferry.write_failed(f"writing failed: {failure}"))

    async def _commit(self, written: Commit) -> None:
        ticket, identity = self.ticket, self.ferries.worker.identity
        assert self.first_token is not None
        digests = await self._collect_digests()
        if digests is None:
            return
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
        worker = self.ferries.worker
        worker.router.unsubscribe(self.sequence.id)
        for digest in self.digests:
            digest.cancel()
        with worker.engine.exclusive() as scheduler:
            scheduler.abort(self.sequence.id)
        self.ferries.remotes.release(self.owner)
        self.ended.set()
        self.ferries.forget(self)

    def _committed(self, num_blocks: int) -> worker_pb2.Committed:
        now_s, sequence, logbook = time.monotonic(), self.sequence, self.logbook
        assert logbook.begun_s is not None
        return worker_pb2.Committed(
            prefill=common_pb2.PrefillStats(
                queue_us=to_us(logbook.begun_s - self.received_s),
                compute_us=to_us(logbook.compute_s),
                num_prompt_tokens=sequence.num_prompt,
                num_cached_tokens=sequence.num_cached,
                num_chunks=sequence.num_chunks,
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


class Ferries:
    """Use as an async context manager.  Owned by the event loop."""

    def __init__(self, worker: Worker, channels: Channels, converter: Converter, digester: Digester) -> None:
        self.worker = worker
        self.channels = channels
        self.converter = converter
        self.digester = digester
        self.remotes = Remotes(worker.transport)
        self.loop = asyncio.get_running_loop()
        self._passages: dict[str, Passage] = {}  # by transfer id
        self._used: OrderedDict[str, Passage | None] = OrderedDict()  # never to be used again
        self._tasks: set[asyncio.Task[None]] = set()
        worker.check_role = self._check_integrity

    async def __aenter__(self) -> Ferries:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stops what is under way, and waits for the last byte."""
        passages = list(self._passages.values())
        for passage in passages:
            passage.stop("the prefill worker is shutting down")
        try:
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                for passage in passages:
                    await passage.ended.wait()
                while self._tasks:
                    await asyncio.wait(self._tasks)
                await self.remotes.close()
        except TimeoutError:
            log.warning("owners_do_not_answer", transfers=len(self._passages), messages=len(self._tasks))
            for task in self._tasks:
                task.cancel()

    async def run(
        self, prompt: list[int], params: common_pb2.SamplingParams, ticket: worker_pb2.Ticket, salt: bytes
    ) -> AsyncGenerator[common_pb2.Token | worker_pb2.Committed, None]:
        """The first token, then the commit's figures.  Leaving early stops compute and writing.  Raises ConflictError,
        having written nothing, when the ticket is not for this worker, is for blocks of other content or outside the
        owner's pool, was used or stopped before, or has expired."""
        expires_s = self.loop.time() + ticket.expires_in_ms / 1000
        passage = await self._begin(prompt, params, ticket, salt, expires_s)
        expiry = self.loop.call_at(expires_s, passage.stop, "the ticket expired")
        try:
            while True:
                item = await passage.outbox.get()
                if isinstance(item, Error):
                    raise item
                yield item
                if isinstance(item, worker_pb2.Committed):
                    return
        finally:
            expiry.cancel()
            passage.stop("the request was cancelled")

    async def stop_transfer(self, request: worker_pb2.StopTransferRequest) -> None:
        """Returns once nothing is written under this ticket any more, nor ever will be.  Raises UnavailableError when that
        cannot be promised, ConflictError when the ticket is another owner's."""
        transfer_id = request.transfer_id
        passage = self._passages.get(transfer_id) or self._used.get(transfer_id)
        if passage is None:
            self._use_up(transfer_id, None)
            return
        ticket = passage.ticket
        asks = (request.owner_id, request.owner_incarnation, request.epoch)
        if asks != (ticket.owner_id, ticket.owner_incarnation, ticket.epoch):
            raise ConflictError(
                f"transfer {transfer_id} is of {ticket.owner_id}/{ticket.owner_incarnation}, epoch {ticket.epoch}, "
                f"not of {request.owner_id}/{request.owner_incarnation}, epoch {request.epoch}",
                reason="TICKET_REFUSED",
            )
        passage.stop("the pool's owner took its blocks back")
        await passage.ended.wait()
        if passage.may_still_arrive:
            raise UnavailableError(f"the connection of transfer {transfer_id} broke; what was sent may still arrive")

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget(self, passage: Passage) -> None:
        del self._passages[passage.ticket.transfer_id]
        # Kept whole only where its end proves nothing.
        self._use_up(passage.ticket.transfer_id, passage if passage.may_still_arrive else None)

    def _check_integrity(self) -> None:
        self.converter.check_integrity()
        assert self._passages or self.converter.is_unused, "room to convert in is held by nobody"

    def _use_up(self, transfer_id: str, passage: Passage | None) -> None:
        self._used[transfer_id] = passage
        if len(self._used) > REMEMBER_USED:
            oldest = next(id_ for id_, kept in self._used.items() if kept is None)
            del self._used[oldest]

    def _require_unused(self, transfer_id: str) -> None:
        if transfer_id in self._passages or transfer_id in self._used:
            raise ConflictError(f"ticket {transfer_id} was used or stopped before", reason="TICKET_REFUSED")

    def _require_unexpired(self, ticket: worker_pb2.Ticket, expires_s: float) -> None:
        if (late_s := self.loop.time() - expires_s) >= 0:
            what = f"ticket {ticket.transfer_id} expired {late_s:.3f} s before the first write"
            raise ConflictError(what, reason="TICKET_REFUSED")

    async def _begin(
        self,
        prompt: list[int],
        params: common_pb2.SamplingParams,
        ticket: worker_pb2.Ticket,
        salt: bytes,
        expires_s: float,
    ) -> Passage:
        received_s = time.monotonic()
        worker, identity = self.worker, self.worker.identity
        if (ticket.writer_id, ticket.writer_incarnation) != (identity.worker_id, identity.incarnation):
            raise ConflictError(
                f"ticket {ticket.transfer_id} is for writer {ticket.writer_id}/{ticket.writer_incarnation}, "
                f"this is {identity.worker_id}/{identity.incarnation}",
                reason="TICKET_REFUSED",
            )
        layout = to_peer_layout(ticket.layout, worker.layout)
        if ticket.num_prompt_tokens != len(prompt):
            raise ConflictError(
                f"ticket {ticket.transfer_id} is for {ticket.num_prompt_tokens} tokens, the prompt has {len(prompt)}",
                reason="TICKET_REFUSED",
            )
        self._require_unused(ticket.transfer_id)
        sequence = worker.make_sequence(ticket.request_id, prompt, params, salt, prefill_only=True)
        try:
            ferry = Ferry(len(ticket.blocks), ticket.first_block_index, len(prompt), layout.block_size)
        except ValueError as e:
            raise ConflictError(str(e), reason="TICKET_REFUSED") from e
        target = Placement(layout, tuple(ticket.blocks), ticket.first_block_index * layout.block_size)
        owner = Owner(ticket.owner_id, ticket.owner_incarnation)
        # Connects while the prompt is computed: the commit must not wait for it.
        self.channels.get(ticket.owner_control_address).get_state(try_to_connect=True)
        worker.num_opening += 1
        try:
            remote = await self.remotes.acquire(owner, ticket.region)
        finally:
            worker.num_opening -= 1
            worker.router.changed.set()
        try:
            self._require_unused(ticket.transfer_id)  # another call may have come meanwhile
            self._require_unexpired(ticket, expires_s)
            _require_inside(ticket, remote.nbytes // layout.block_nbytes)
            passage = Passage(self, ticket, sequence, ferry, target, remote, owner, received_s)
            worker.router.subscribe(sequence.id, passage)
            worker.add(sequence)
        except Error:
            worker.router.unsubscribe(sequence.id)
            self.remotes.release(owner)
            raise
        self._passages[ticket.transfer_id] = passage
        return passage


def _to_chunk_times(chunk: ChunkTimes, begun_s: float) -> common_pb2.ChunkTimes:
    message = common_pb2.ChunkTimes(
        compute_begin_us=to_us(chunk.compute_s[0] - begun_s),
        compute_end_us=to_us(chunk.compute_s[1] - begun_s),
        num_blocks=chunk.num_blocks,
    )
    if chunk.write_s is not None:
        message.write_begin_us, message.write_end_us = (to_us(at_s - begun_s) for at_s in chunk.write_s)
    return message


def _require_inside(ticket: worker_pb2.Ticket, num_blocks: int) -> None:
    if max(ticket.blocks, default=-1) >= num_blocks or len(set(ticket.blocks)) < len(ticket.blocks):
        raise ConflictError(
            f"ticket {ticket.transfer_id} names blocks outside its owner's pool of {num_blocks}, or one of them twice",
            reason="TICKET_REFUSED",
        )


def _to_error(failure: BaseException) -> Error:
    if isinstance(failure, PeerLost | TransportClosed):
        return UnavailableError(f"the pool's owner was lost: {failure}", reason="OWNER_LOST")
    return AbortedError(f"writing KV blocks failed: {failure}", reason="WRITE_FAILED")
