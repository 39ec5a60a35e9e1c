"""Permissions to write into this pool, from reservation to proof that the writer has stopped.  Pure: times come in.

    LENT ──commit──▶ COMMITTED
     │
     ├─abort by the writer (its word that it has stopped)──▶ CLOSED
     └─expiry, or given up by the owner──▶ REVOKING ──proof──▶ CLOSED

A ticket leaves LENT once.  REVOKING holds its blocks in quarantine until ``prove_stopped``; a commit that arrives then
is refused, but tells that the writer has stopped, so it is proof as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from services.engine.blocks import BlockPool
from services.engine.layout import KvLayout
from services.engine.sequence import SequenceId

# Ended tickets are remembered this long so that a repeated commit or abort is answered as the first one was.
REMEMBER_ENDED = 1024


class TicketState(Enum):
    LENT = auto()
    COMMITTED = auto()
    REVOKING = auto()
    CLOSED = auto()


class TicketRefusedError(Exception):
    """The message is not for a ticket in a state that allows it; nothing was changed, save that a commit or abort for a
    revoked ticket proves its writer has stopped."""


@dataclass(frozen=True, slots=True)
class WriterId:
    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer says that it wrote, in the owner's blocks and bytes."""

    num_blocks: int
    num_tokens: int
    num_bytes: int


@dataclass(slots=True, eq=False)
class Ticket:
    transfer_id: str
    epoch: int
    sequence_id: SequenceId
    writer: WriterId
    first_block_index: int
    blocks: tuple[int, ...]
    num_tokens: int
    expires_s: float
    state: TicketState = field(default=TicketState.LENT)


class TicketBook:
    """The tickets of one pool.  Calls come from one place at a time (the engine's exclusive section)."""

    def __init__(self, pool: BlockPool, layout: KvLayout) -> None:
        self._pool = pool
        self._layout = layout
        self._tickets: dict[str, Ticket] = {}
        self._ended: dict[str, Ticket] = {}
        self._epoch = 0

    def open(
        self,
        transfer_id: str,
        sequence_id: SequenceId,
        writer: WriterId,
        first_block_index: int,
        blocks: list[int],
        num_tokens: int,
        *,
        now_s: float,
        lifetime_s: float,
    ) -> Ticket:
        """A ticket for the KV of ``num_tokens`` tokens in ``blocks``, which are LENT in the pool."""
        assert transfer_id not in self._tickets
        self._epoch += 1
        ticket = Ticket(
            transfer_id,
            self._epoch,
            sequence_id,
            writer,
            first_block_index,
            tuple(blocks),
            num_tokens,
            now_s + lifetime_s,
        )
        self._tickets[transfer_id] = ticket
        return ticket

    def commit(
        self, transfer_id: str, epoch: int, writer: WriterId, written: Written, *, now_s: float
    ) -> Ticket | None:
        """The ticket, now COMMITTED: its blocks may be settled.  None when this very commit was accepted before.  Raises
        TicketRefusedError when the ticket is unknown, another's, expired, given up, or not wholly written."""
        ticket = self._find(transfer_id, epoch, writer)
        if ticket.state is TicketState.COMMITTED:
            return None
        if ticket.state is TicketState.REVOKING:
            self.prove_stopped(transfer_id)
        if ticket.state is not TicketState.LENT:
            raise TicketRefusedError(f"transfer {transfer_id} was given up before it was committed")
        if not self._is_whole(ticket, written):
            self._close_lent(ticket)
            raise TicketRefusedError(
                f"transfer {transfer_id} asked for {ticket.num_tokens} tokens of {self._layout.token_nbytes} bytes in "
                f"{len(ticket.blocks)} blocks, its writer says that it wrote {written.num_tokens} tokens in "
                f"{written.num_blocks} blocks and {written.num_bytes} bytes"
            )
        if now_s > ticket.expires_s:
            self._close_lent(ticket)
            raise TicketRefusedError(f"transfer {transfer_id} expired {now_s - ticket.expires_s:.3f} s ago")
        self._retire(ticket, TicketState.COMMITTED)
        return ticket

    def abort_by_writer(self, transfer_id: str, epoch: int, writer: WriterId) -> Ticket | None:
        """The writer has stopped for good.  The ticket when this ended it while LENT; None when it had ended before."""
        ticket = self._find(transfer_id, epoch, writer)
        if ticket.state is TicketState.REVOKING:
            self.prove_stopped(transfer_id)
        if ticket.state is not TicketState.LENT:
            return None
        self._close_lent(ticket)
        return ticket

    def give_up(self, transfer_id: str) -> Ticket | None:
        """The owner no longer wants the transfer: its blocks are quarantined and the writer must be asked to stop.  None
        when the ticket is not LENT."""
        ticket = self._tickets.get(transfer_id)
        if ticket is None or ticket.state is not TicketState.LENT:
            return None
        self._pool.quarantine(ticket.blocks)
        ticket.state = TicketState.REVOKING
        return ticket

    def is_lent(self, transfer_id: str) -> bool:
        ticket = self._tickets.get(transfer_id)
        return ticket is not None and ticket.state is TicketState.LENT

    def expired(self, now_s: float) -> list[Ticket]:
        """LENT tickets whose time is over; the caller gives them up."""
        return [t for t in self._tickets.values() if t.state is TicketState.LENT and now_s > t.expires_s]

    def next_expiry_s(self) -> float | None:
        return min((t.expires_s for t in self._tickets.values() if t.state is TicketState.LENT), default=None)

    def prove_stopped(self, transfer_id: str) -> bool:
        """The caller has proof that the writer has stopped: the quarantined blocks become free.  Idempotent."""
        ticket = self._tickets.get(transfer_id)
        if ticket is None or ticket.state is not TicketState.REVOKING:
            return False
        self._pool.restore(ticket.blocks)
        self._retire(ticket, TicketState.CLOSED)
        return True

    def check_integrity(self) -> None:
        """Raises AssertionError unless the LENT and QUARANTINED blocks are exactly those that open tickets name."""
        lent = sorted(b for t in self._tickets.values() if t.state is TicketState.LENT for b in t.blocks)
        quarantined = sorted(b for t in self._tickets.values() if t.state is TicketState.REVOKING for b in t.blocks)
        assert len(set(lent + quarantined)) == len(lent + quarantined), "two tickets share a block"
        assert lent == self._pool.lent_blocks(), "the LENT blocks are not those of open tickets"
        assert quarantined == self._pool.quarantined_blocks(), "the QUARANTINED blocks are not those of revoked tickets"

    def _find(self, transfer_id: str, epoch: int, writer: WriterId) -> Ticket:
        ticket = self._tickets.get(transfer_id) or self._ended.get(transfer_id)
        if ticket is None:
            raise TicketRefusedError(f"transfer {transfer_id} is not known here")
        if ticket.epoch != epoch:
            raise TicketRefusedError(f"transfer {transfer_id} has epoch {ticket.epoch}, not {epoch}")
        if ticket.writer != writer:
            raise TicketRefusedError(
                f"transfer {transfer_id} was lent to {ticket.writer.worker_id}/{ticket.writer.incarnation}, "
                f"not to {writer.worker_id}/{writer.incarnation}"
            )
        return ticket

    def _is_whole(self, ticket: Ticket, written: Written) -> bool:
        """Of a last block that the prompt fills in part, writers send all bytes or those of the tokens only."""
        nbytes = (ticket.num_tokens * self._layout.token_nbytes, len(ticket.blocks) * self._layout.block_nbytes)
        asked = (len(ticket.blocks), ticket.num_tokens)
        return (written.num_blocks, written.num_tokens) == asked and written.num_bytes in nbytes

    def _close_lent(self, ticket: Ticket) -> None:
        """Its writer spoke for the last time: no proof is needed beyond that."""
        self._pool.quarantine(ticket.blocks)
        self._pool.restore(ticket.blocks)
        self._retire(ticket, TicketState.CLOSED)

    def _retire(self, ticket: Ticket, state: TicketState) -> None:
        ticket.state = state
        del self._tickets[ticket.transfer_id]
        self._ended[ticket.transfer_id] = ticket
        if len(self._ended) > REMEMBER_ENDED:
            del self._ended[next(iter(self._ended))]
