"""Requests on a decode worker: room reserved for a writer's blocks, tickets ended, blocks taken back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

import grpc
import structlog

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import AbortedError, ConflictError, Error, InternalError, InvalidRequestError
from services.decode.distrust import Distrust
from services.decode.tickets import (
    ChecksumMismatchError,
    DoubtfulCommitError,
    Ticket,
    TicketBook,
    TicketRefusedError,
    TicketState,
    WriterId,
    Written,
)
from services.engine.engine import StepTime
from services.engine.scheduler import Scheduler
from services.engine.sequence import Event, FinishReason, Resumed, Sequence, StepFailed, TokenDrawn
from services.runtime.channels import Channels
from services.runtime.process import ProcessIdentity, has_ended
from services.runtime.tasks import Tasks
from services.worker.convert import to_drawn
from services.worker.digester import Digester
from services.worker.pull_terms import PullReport, Source
from services.worker.puller import Puller
from services.worker.share import Share
from services.worker.worker import Worker, refusals_as_errors

log = structlog.get_logger(__name__)


STOP_TIMEOUT_S = 5.0  # for one question to a writer
STOP_BACKOFF_S = (0.2, 5.0)
FENCE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What a writer's ticket is given on: until when it must commit, and how its word is checked."""

    ticket_lifetime_s: float
    verified: Share
    pair_quarantine_s: float


@dataclass(frozen=True, slots=True)
class Writer:
    id: WriterId
    control_address: str
    process: ProcessIdentity


@dataclass(frozen=True, slots=True)
class Finished:
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class _Verdict:
    """``refusal`` None: the commit is accepted."""

    elapsed_s: float
    refusal: TicketRefusedError | None


News = TokenDrawn | Finished | Error


@dataclass(slots=True, eq=False)
class DecodeStream:
    """One request here.  ``tell`` hears its tokens, in order, and at last Finished or an Error, in the event loop; at most
    max_tokens + 2 news in all.  A token that came with delivered KV is told when the step that goes on behind it begins, so
    that the next one is no later than others are."""

    request_id: str
    sequence: Sequence
    ticket: Ticket | None
    writer: Writer | None
    opened_s: float
    tell: Callable[[News], None]
    pulling: asyncio.Task[None] | None = None
    pulled: PullReport | None = None
    kv_ready_s: float | None = None
    first_step_s: float | None = None  # when its first step with delivered KV began
    started_s: float | None = None  # when its own prefill began
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_steps: int = 0
    _has_token: bool = False
    _withheld: TokenDrawn | None = None

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
            case TokenDrawn(finish=None) if self.ticket is not None and not self._has_token:
                self._has_token = True
                self._withheld = event
            case Resumed() if self._withheld is not None:
                self.tell(self._withheld)
            case TokenDrawn(finish=finish):
                self._has_token = True
                self.tell(event)
                if finish is not None:
                    self.tell(Finished(finish))
            case StepFailed(message=message):
                self.tell(InternalError(message))


class Reservations:
    """Use as an async context manager.  Owned by the event loop."""

    def __init__(
        self, worker: Worker, channels: Channels, puller: Puller, digester: Digester, terms: Terms,
        draw: Callable[[], float] = random.random,
    ) -> None:  # fmt: skip
        """``draw`` chooses the transfers to verify."""
        with worker.engine.exclusive(wake=False) as scheduler:
            self._book = TicketBook(scheduler.pool, worker.layout)
        self._worker = worker
        self._channels = channels
        self._puller = puller
        self._digester = digester
        self._terms = terms
        self._draw = draw
        self._distrust = Distrust(terms.pair_quarantine_s)
        self._streams: dict[str, DecodeStream] = {}  # by transfer id, while it may still be accepted
        self._checks: dict[str, asyncio.Task[_Verdict]] = {}  # by transfer id, while its blocks are read
        self._tasks = Tasks()
        self._expiry_changed = asyncio.Event()
        worker.role_checks[common_pb2.WORKER_ROLE_DECODE] = self._check_integrity

    async def __aenter__(self) -> Reservations:
        self._tasks.spawn(self._expire_tickets())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.stop()

    def open(
        self, request_id: str, prompt: list[int], params: common_pb2.SamplingParams, salt: bytes,
        writer: Writer | None, tell: Callable[[News], None], source: Source | None = None,
    ) -> DecodeStream:  # fmt: skip
        """Without a writer the prompt is computed here, save what may be read from ``source`` first.  The caller must
        ``close`` it, also when it has ended.  Raises OverloadedError, InvalidRequestError, UnavailableError or, of a writer
        whose blocks arrived damaged, AbortedError, having reserved nothing."""
        sequence = self._worker.make_sequence(request_id, prompt, params, salt)
        ticket = self._reserve(sequence, writer) if writer else None
        stream = DecodeStream(request_id, sequence, ticket, writer, time.monotonic(), tell)
        self._worker.router.subscribe(sequence.id, stream)
        if ticket is not None:
            self._streams[ticket.transfer_id] = stream
            self._expiry_changed.set()
            return stream
        if source is not None:
            stream.pulling = self._tasks.spawn(self._pull_and_add(stream, source))
            return stream
        try:
            self._worker.add(sequence)
        except BaseException:
            self.close(stream)
            raise
        return stream

    def close(self, stream: DecodeStream) -> None:
        """Ends its compute and takes its blocks back; it has nothing more to tell.  Once."""
        self._worker.router.unsubscribe(stream.sequence.id)
        if stream.pulling is not None:
            stream.pulling.cancel()
        self._abandon(stream)

    async def commit(
        self, transfer_id: str, epoch: int, writer: WriterId, written: Written, first: common_pb2.Token
    ) -> float:
        """The writer says that every byte is in place.  Returns once the commit is accepted: how many seconds of that went
        into verifying, 0 when the ticket did not ask for it.  Raises ConflictError, or InvalidRequestError, with nothing
        changed, when ``first`` is no token.  Cancelling does not end a check: its verdict stands, and a repeated commit
        gets it."""
        if first.id >= self._worker.model.vocab_size:  # it would end the step that computes it, and all others in it
            what = f"the first token, {first.id}, is outside the vocabulary of {self._worker.model.vocab_size}"
            raise InvalidRequestError(what)
        try:
            with self._worker.engine.exclusive() as scheduler:
                ticket = self._book.commit(transfer_id, epoch, writer, written, now_s=time.monotonic())
                if ticket is None:
                    return 0.0
                if ticket.state is TicketState.COMMITTED:
                    events = self._deliver(scheduler, ticket, first)
        except TicketRefusedError as e:
            if not self._book.is_pending(transfer_id):  # otherwise somebody spoke in the writer's name
                self._fail(transfer_id, str(e))
            elif isinstance(e, DoubtfulCommitError):
                self._give_up(self._streams[transfer_id], AbortedError(str(e), reason="TRANSFER_ABORTED"))
            raise _to_error(e) from e
        if ticket.state is TicketState.COMMITTED:
            self._accepted(ticket, events)
            return 0.0
        if transfer_id not in self._checks:
            self._checks[transfer_id] = self._tasks.spawn(self._check(ticket, self._streams[transfer_id], first))
        verdict = await asyncio.shield(self._checks[transfer_id])
        if verdict.refusal is not None:
            raise _to_error(verdict.refusal) from verdict.refusal
        return verdict.elapsed_s

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

    async def _pull_and_add(self, stream: DecodeStream, source: Source) -> None:
        self._worker.num_opening += 1
        try:
            stream.pulled = await self._puller.pull(stream.sequence, source)
        finally:
            self._worker.num_opening -= 1
            self._worker.router.changed.set()
        stream.pulling = None
        try:
            self._worker.add(stream.sequence)
        except Error as e:
            stream.tell(e)

    def _check_integrity(self) -> None:
        self._book.check_integrity(self._worker.pulls.away())

    def _reserve(self, sequence: Sequence, writer: Writer) -> Ticket:
        now_s = time.monotonic()
        if remaining_s := self._distrust.remaining_s(writer.id, now_s=now_s):
            raise AbortedError(
                f"{self._worker.identity.worker_id} takes no blocks from {writer.id.worker_id} for another "
                f"{remaining_s:.0f} s: some arrived damaged",
                reason="PAIR_QUARANTINED",
            )
        with refusals_as_errors(), self._worker.engine.exclusive(wake=False) as scheduler:
            first_block_index, lent = scheduler.reserve(sequence)
            return self._book.open(
                uuid4().hex, sequence.id, writer.id, first_block_index, lent, sequence.num_prompt - sequence.num_cached,
                now_s=now_s, lifetime_s=self._terms.ticket_lifetime_s,
                verify=bool(lent) and self._terms.verified.takes(self._draw()),
            )  # fmt: skip

    def _deliver(self, scheduler: Scheduler, ticket: Ticket, first: common_pb2.Token) -> list[Event]:
        # No step begins before the lock is let go.
        self._streams[ticket.transfer_id].kv_ready_s = time.monotonic()
        return scheduler.deliver(ticket.sequence_id, list(ticket.blocks), to_drawn(first))

    def _accepted(self, ticket: Ticket, events: list[Event]) -> None:
        del self._streams[ticket.transfer_id]
        self._worker.traffic.blocks_received += len(ticket.blocks)
        self._worker.traffic.bytes_received += ticket.num_bytes
        self._worker.router.deliver(events)

    async def _check(self, ticket: Ticket, stream: DecodeStream, first: common_pb2.Token) -> _Verdict:
        """Reads the blocks of a VERIFYING ticket to the end, whatever becomes of its request, and concludes it."""
        began_s = time.monotonic()
        found: list[int] | None = None
        try:
            found = await self._digester.digest(ticket.blocks, ticket.first_block_index, stream.sequence.num_prompt)
        except Exception:  # one transfer fails, and its blocks come back
            log.exception("check_failed", request_id=stream.request_id, transfer_id=ticket.transfer_id)
        del self._checks[ticket.transfer_id]
        refusal: TicketRefusedError | None = None
        try:
            with self._worker.engine.exclusive() as scheduler:
                self._book.conclude(ticket.transfer_id, found)
                events = self._deliver(scheduler, ticket, first)
        except TicketRefusedError as e:
            refusal = e
        traffic = self._worker.traffic
        if ticket.wrong:
            traffic.checks_mismatch += 1
        elif found is not None:
            traffic.checks_ok += 1
        if refusal is None:
            self._accepted(ticket, events)
        else:
            self._fail(ticket.transfer_id, str(refusal), "CHECKSUM_MISMATCH" if ticket.wrong else "TRANSFER_ABORTED")
        if ticket.wrong:
            self._quarantine_pair(ticket, stream)
        self._worker.router.changed.set()
        return _Verdict(time.monotonic() - began_s, refusal)

    def _quarantine_pair(self, ticket: Ticket, stream: DecodeStream) -> None:
        """Takes nothing more from the ticket's writer for a while, nor what it is about to write unverified."""
        writer = ticket.writer
        log.error(
            "checksum_mismatch",
            request_id=stream.request_id,
            transfer_id=ticket.transfer_id,
            writer=writer.worker_id,
            writer_incarnation=writer.incarnation,
            wrong_blocks=ticket.wrong,
            quarantine_s=self._terms.pair_quarantine_s,
        )
        self._distrust.add(writer, now_s=time.monotonic())
        with self._worker.engine.exclusive(wake=False):
            lent = self._book.lent_to(writer)
        why = f"blocks of another transfer from {writer.worker_id} arrived damaged"
        for other in lent:
            self._give_up(self._streams[other.transfer_id], AbortedError(why, reason="PAIR_QUARANTINED"))

    def _abandon(self, stream: DecodeStream) -> None:
        with self._worker.engine.exclusive() as scheduler:
            revoked = self._book.give_up(stream.ticket.transfer_id) if stream.ticket else None
            scheduler.abort(stream.sequence.id)
        if stream.ticket is not None:
            self._streams.pop(stream.ticket.transfer_id, None)
        if revoked is not None:
            assert stream.writer is not None
            self._tasks.spawn(self._take_back(revoked, stream.writer, stream.request_id))

    def _fail(self, transfer_id: str, why: str, reason: str = "TRANSFER_ABORTED") -> None:
        """The ticket ended without a commit: its request cannot go on."""
        if stream := self._streams.pop(transfer_id, None):
            stream.tell(AbortedError(why, reason=reason))

    def _give_up(self, stream: DecodeStream, error: AbortedError) -> None:
        """Fails a request whose ticket is LENT and takes its blocks back from the writer."""
        stream.tell(error)
        self._abandon(stream)

    async def _expire_tickets(self) -> None:
        while True:
            self._expiry_changed.clear()
            with self._worker.engine.exclusive(wake=False):
                late = self._book.expired(time.monotonic())
                next_s = self._book.next_expiry_s()
            for ticket in late:
                lifetime_s = self._terms.ticket_lifetime_s
                why = f"the writer {ticket.writer.worker_id} did not commit within {lifetime_s:g} s"
                self._give_up(self._streams[ticket.transfer_id], AbortedError(why, reason="TICKET_EXPIRED"))
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
        asked = False
        while ticket.state is TicketState.REVOKING and not await self._has_stopped(ticket, writer, asked_before=asked):
            asked = True
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

    async def _has_stopped(self, ticket: Ticket, writer: Writer, *, asked_before: bool) -> bool:
        if has_ended(writer.process):
            return await self._nothing_follows()
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
                    writer_process=writer.process.to_proto(),
                ),
                timeout=STOP_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as e:
            log.info("stop_transfer_failed", transfer_id=ticket.transfer_id, error=e.details())
            return bool(has_ended(writer.process)) and await self._nothing_follows()
        if answer.incarnation == writer.id.incarnation:
            # It may have refused to say so because a connection had broken, of which something may lie in a socket here.
            return not asked_before or await self._nothing_follows()
        # A successor may answer while its predecessor is still in its last moments.
        return has_ended(writer.process) is not False and await self._nothing_follows()

    async def _nothing_follows(self) -> bool:
        """The end of a process proves that it sends no more; what it sent may still lie in a socket of this host."""
        return await asyncio.to_thread(self._worker.transport.fence, FENCE_TIMEOUT_S)


def _to_error(refusal: TicketRefusedError) -> ConflictError:
    reason = "CHECKSUM_MISMATCH" if isinstance(refusal, ChecksumMismatchError) else "TICKET_REFUSED"
    return ConflictError(str(refusal), reason=reason)
