"""Requests on a decode worker: room reserved for a writer's blocks, tickets ended, blocks taken back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc
import structlog

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import AbortedError, ConflictError, InternalError
from services.decode.tickets import Ticket, TicketBook, TicketRefusedError, TicketState, WriterId
from services.engine.engine import StepTime
from services.engine.sequence import Event, FinishReason, Sequence, StepFailed, TokenDrawn
from services.runtime.channels import Channels
from services.runtime.process import ProcessIdentity, has_ended
from services.worker.convert import to_drawn
from services.worker.worker import Worker, refusals_as_errors

log = structlog.get_logger(__name__)

STOP_TIMEOUT_S = 5.0  # for one question to a writer
STOP_BACKOFF_S = (0.2, 5.0)


@dataclass(frozen=True, slots=True)
class Writer:
    id: WriterId
    control_address: str
    process: ProcessIdentity


@dataclass(frozen=True, slots=True)
class Finished:
    reason: FinishReason


@dataclass(slots=True, eq=False)
class DecodeStream:
    """What one request's servicer awaits.  At most max_tokens + 2 items ever enter the queue."""

    request_id: str
    sequence: Sequence
    ticket: Ticket | None
    writer: Writer | None
    opened_s: float
    events: asyncio.Queue[TokenDrawn | Finished | Exception] = field(default_factory=asyncio.Queue)
    kv_ready_s: float | None = None
    first_step_s: float | None = None  # when its first step with delivered KV began
    started_s: float | None = None  # when its own prefill began
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_steps: int = 0
    _has_token: bool = False

    def on_step(self, step: StepTime) -> None:
        self.started_s = self.started_s or step.started_s
        if self._has_token:
            self.first_step_s = self.first_step_s or step.started_s
            self.decode_s += step.elapsed_s
            self.num_steps += 1
        else:
            self.prefill_s += step.elapsed_s

    def on_event(self, event: Event) -> None:
        match event:
            case TokenDrawn(finish=finish):
                self._has_token = True
                self.events.put_nowait(event)
                if finish is not None:
                    self.events.put_nowait(Finished(finish))
            case StepFailed(message=message):
                self.events.put_nowait(InternalError(message))


class Reservations:
    """Use as an async context manager.  Owned by the event loop."""

    def __init__(self, worker: Worker, channels: Channels, ticket_lifetime_s: float) -> None:
        with worker.engine.exclusive(wake=False) as scheduler:
            self._book = TicketBook(scheduler.pool, worker.layout.block_nbytes)
        self._worker = worker
        self._channels = channels
        self._ticket_lifetime_s = ticket_lifetime_s
        self._streams: dict[str, DecodeStream] = {}  # by transfer id, while LENT
        self._tasks: set[asyncio.Task[None]] = set()
        self._expiry_changed = asyncio.Event()
        worker.check_role = self._book.check_integrity

    async def __aenter__(self) -> Reservations:
        self._spawn(self._expire_tickets())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @asynccontextmanager
    async def open(
        self, request_id: str, prompt: list[int], params: common_pb2.SamplingParams, salt: bytes, writer: Writer | None
    ) -> AsyncIterator[DecodeStream]:
        """The request's life here; leaving the context ends its compute and takes its blocks back.  Raises OverloadedError,
        InvalidRequestError or UnavailableError, having reserved nothing."""
        sequence = self._worker.make_sequence(request_id, prompt, params, salt)
        ticket = self._reserve(sequence, writer) if writer else None
        stream = DecodeStream(request_id, sequence, ticket, writer, time.monotonic())
        self._worker.router.subscribe(sequence.id, stream)
        if ticket is not None:
            self._streams[ticket.transfer_id] = stream
            self._expiry_changed.set()
        try:
            if ticket is None:
                self._worker.add(sequence)
            yield stream
        finally:
            self._worker.router.unsubscribe(sequence.id)
            self._abandon(stream)

    def commit(
        self, transfer_id: str, epoch: int, writer: WriterId, num_blocks: int, num_bytes: int, first: common_pb2.Token
    ) -> None:
        """The writer says that every byte is in place.  Raises ConflictError."""
        try:
            with self._worker.engine.exclusive() as scheduler:
                ticket = self._book.commit(transfer_id, epoch, writer, num_blocks, num_bytes, now_s=time.monotonic())
                if ticket is None:
                    return
                events = scheduler.deliver(ticket.sequence_id, list(ticket.blocks), to_drawn(first))
                self._streams.pop(transfer_id).kv_ready_s = time.monotonic()  # no step begins before the lock is let go
        except TicketRefusedError as e:
            if not self._book.is_lent(transfer_id):  # otherwise somebody spoke in the writer's name
                self._fail(transfer_id, str(e))
            raise ConflictError(str(e), reason="TICKET_REFUSED") from e
        self._worker.traffic.blocks_received += num_blocks
        self._worker.traffic.bytes_received += num_bytes
        self._worker.router.deliver(events)

    def abort_by_writer(self, transfer_id: str, epoch: int, writer: WriterId, reason: str) -> None:
        """The writer says that it has stopped for good.  Raises ConflictError when the ticket is not its."""
        try:
            with self._worker.engine.exclusive() as scheduler:
                ticket = self._book.abort_by_writer(transfer_id, epoch, writer)
                if ticket is not None:
                    scheduler.abort(ticket.sequence_id)
        except TicketRefusedError as e:
            raise ConflictError(str(e), reason="TICKET_REFUSED") from e
        if ticket is not None:
            self._fail(transfer_id, f"the writer gave up: {reason}")

    def _reserve(self, sequence: Sequence, writer: Writer) -> Ticket:
        with refusals_as_errors(), self._worker.engine.exclusive(wake=False) as scheduler:
            first_block_index, lent = scheduler.reserve(sequence)
            return self._book.open(
                uuid4().hex, sequence.id, writer.id, first_block_index, lent,
                now_s=time.monotonic(), lifetime_s=self._ticket_lifetime_s,
            )  # fmt: skip

    def _abandon(self, stream: DecodeStream) -> None:
        with self._worker.engine.exclusive() as scheduler:
            revoked = self._book.give_up(stream.ticket.transfer_id) if stream.ticket else None
            scheduler.abort(stream.sequence.id)
        if stream.ticket is not None:
            self._streams.pop(stream.ticket.transfer_id, None)
        if revoked is not None:
            assert stream.writer is not None
            self._spawn(self._take_back(revoked, stream.writer, stream.request_id))

    def _fail(self, transfer_id: str, why: str) -> None:
        """The ticket ended without a commit: its request cannot go on."""
        if stream := self._streams.pop(transfer_id, None):
            stream.events.put_nowait(AbortedError(why, reason="TRANSFER_ABORTED"))

    async def _expire_tickets(self) -> None:
        while True:
            self._expiry_changed.clear()
            with self._worker.engine.exclusive(wake=False):
                late = self._book.expired(time.monotonic())
                next_s = self._book.next_expiry_s()
            for ticket in late:
                stream = self._streams[ticket.transfer_id]
                why = f"the writer {ticket.writer.worker_id} did not commit within {self._ticket_lifetime_s:g} s"
                stream.events.put_nowait(AbortedError(why, reason="TICKET_EXPIRED"))
                self._abandon(stream)
            if late:
                continue
            wait_s = None if next_s is None else max(0.0, next_s - time.monotonic()) + 0.001
            try:
                async with asyncio.timeout(wait_s):
                    await self._expiry_changed.wait()
            except TimeoutError:
                pass

    async def _take_back(self, ticket: Ticket, writer: Writer, request_id: str) -> None:
        """Asks the writer to stop until there is proof that it has; its blocks stay in quarantine for so long.  The writer
        may also speak first, by its abort or a commit that comes too late."""
        delay_s, longest_s = STOP_BACKOFF_S
        while ticket.state is TicketState.REVOKING and not await self._has_stopped(ticket, writer):
            log.warning(
                "quarantine",
                request_id=request_id,
                transfer_id=ticket.transfer_id,
                writer=writer.id.worker_id,
                blocks=len(ticket.blocks),
            )
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(2 * delay_s, longest_s)
        with self._worker.engine.exclusive():
            self._book.prove_stopped(ticket.transfer_id)
        self._worker.router.changed.set()

    async def _has_stopped(self, ticket: Ticket, writer: Writer) -> bool:
        if has_ended(writer.process):
            return True
        stub = worker_pb2_grpc.WorkerServiceStub(self._channels.get(writer.control_address))
        identity = self._worker.identity
        try:
            answer = await stub.StopTransfer(
                worker_pb2.StopTransferRequest(
                    transfer_id=ticket.transfer_id,
                    epoch=ticket.epoch,
                    owner_id=identity.worker_id,
                    owner_incarnation=identity.incarnation,
                    writer_id=writer.id.worker_id,
                    writer_incarnation=writer.id.incarnation,
                ),
                timeout=STOP_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as e:
            log.info("stop_transfer_failed", transfer_id=ticket.transfer_id, error=e.details())
            return bool(has_ended(writer.process))
        # A successor may answer while its predecessor is still in its last moments.
        return answer.incarnation == writer.id.incarnation or has_ended(writer.process) is not False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
