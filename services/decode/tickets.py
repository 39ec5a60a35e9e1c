"""Permissions to write into this pool, from reservation to proof that the writer has stopped.  Pure: times come in.

    LENT ──commit──▶ COMMITTED
     │
     ├─commit of a ticket to be verified──▶ VERIFYING ──digests equal──▶ COMMITTED
     │                                          ├─digests differ──▶ CLOSED
     │                                          └─given up by the owner──▶ DISCARDING ──check ended──▶ CLOSED
     ├─abort by the writer (its word that it has stopped)──▶ CLOSED
     └─expiry, given up by the owner, or a doubtful commit──▶ REVOKING ──proof──▶ CLOSED

A ticket leaves LENT once.  REVOKING holds its blocks in quarantine until ``prove_stopped``; a commit that arrives then
is refused, but tells that the writer has stopped, so it is proof as well, unless it contradicts the ticket: such a
commit proves nothing, and its writer is asked.  In VERIFYING and DISCARDING the writer has
said its last word, and a check of ours reads the blocks: they go to nobody else before it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from enum import Enum, auto

from services.engine.blocks import BlockPool
from services.engine.layout import KvLayout
from services.engine.sequence import SequenceId

# Ended tickets are remembered this long so that a repeated commit or abort is answered as the first one was.
REMEMBER_ENDED = 1024
# Of a long prompt that is wrong throughout, so many blocks are named.
NAME_WRONG_BLOCKS = 8


class TicketState(Enum):
    LENT = auto()
    VERIFYING = auto()
    DISCARDING = auto()
    COMMITTED = auto()
    REVOKING = auto()
    CLOSED = auto()


class TicketRefusedError(Exception):
    """The message is not for a ticket in a state that allows it; nothing was changed, save that a commit or abort for a
    revoked ticket proves its writer has stopped."""


class DoubtfulCommitError(TicketRefusedError):
    """The commit contradicts its ticket: whoever miscounts its writes is not believed to have ended them.  A ticket that
    was LENT still is; its owner gives it up."""


class ChecksumMismatchError(TicketRefusedError):
    """What lies in the blocks is not what their writer sent; the ticket is closed."""


@dataclass(frozen=True, slots=True)
class WriterId:
    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer says that it wrote, in the owner's blocks and bytes; a digest of each block where asked."""

    num_blocks: int
    num_tokens: int
    num_bytes: int
    digests: tuple[int, ...] = ()


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
    verify: bool
    state: TicketState = field(default=TicketState.LENT)
    num_bytes: int = 0  # written; set by the commit, like the next
    digests: tuple[int, ...] = ()  # of each block, by its writer
    wrong: tuple[int, ...] = ()  # indices in the prompt of blocks whose digests differ; set by ``conclude``


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
        verify: bool = False,
    ) -> Ticket:
        """A ticket for the KV of ``num_tokens`` tokens in ``blocks``, which are LENT in the pool.  ``verify``: its commit
        is checked before it is accepted."""
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
            verify,
        )
        self._tickets[transfer_id] = ticket
        return ticket

    def commit(
        self, transfer_id: str, epoch: int, writer: WriterId, written: Written, *, now_s: float
    ) -> Ticket | None:
        """The ticket, now COMMITTED: its blocks may be settled; or VERIFYING: digest them and ``conclude``, once, also
        when the commit is repeated meanwhile.  None when this very commit was accepted before.  Raises TicketRefusedError
        when the ticket is unknown, another's, expired or given up, DoubtfulCommitError when not everything was written or
        the digests it asked for are not there."""
        ticket = self._find(transfer_id, epoch, writer)
        if ticket.state is TicketState.COMMITTED:
            return None
        if ticket.state in (TicketState.VERIFYING, TicketState.DISCARDING):
            return ticket
        if ticket.wrong:
            raise _mismatch(ticket)
        if ticket.state is not TicketState.CLOSED:
            self._require_whole(ticket, written)
        if ticket.state is TicketState.REVOKING:
            self.prove_stopped(transfer_id)
        if ticket.state is not TicketState.LENT:
            raise TicketRefusedError(f"transfer {transfer_id} was given up before it was committed")
        if now_s > ticket.expires_s:
            self._close_lent(ticket)
            raise TicketRefusedError(f"transfer {transfer_id} expired {now_s - ticket.expires_s:.3f} s ago")
        ticket.num_bytes = written.num_bytes
        if ticket.verify:
            ticket.digests = written.digests
            ticket.state = TicketState.VERIFYING
        else:
            self._retire(ticket, TicketState.COMMITTED)
        return ticket

    def conclude(self, transfer_id: str, found: Sequence[int] | None) -> Ticket:
        """The check of a VERIFYING or DISCARDING ticket has ended, and nobody reads its blocks any more.  ``found`` are
        their digests here, None when they could not be had.  The ticket, now COMMITTED: its blocks may be settled.
        Otherwise they are free: raises ChecksumMismatchError, or TicketRefusedError without digests or when the owner gave
        the transfer up meanwhile."""
        ticket = self._tickets[transfer_id]
        was = ticket.state
        assert was in (TicketState.VERIFYING, TicketState.DISCARDING), was.name
        if found is not None:
            pairs = enumerate(zip(ticket.digests, found, strict=True), ticket.first_block_index)
            ticket.wrong = tuple(index for index, (sent, arrived) in pairs if sent != arrived)
        if was is TicketState.VERIFYING and found is not None and not ticket.wrong:
            self._retire(ticket, TicketState.COMMITTED)
            return ticket
        if was is TicketState.VERIFYING:
            self._pool.quarantine(ticket.blocks)
        self._pool.restore(ticket.blocks)
        self._retire(ticket, TicketState.CLOSED)
        if ticket.wrong:
            raise _mismatch(ticket)
        why = "was given up before it was committed" if was is TicketState.DISCARDING else "could not be verified"
        raise TicketRefusedError(f"transfer {transfer_id} {why}")

    def abort_by_writer(self, transfer_id: str, epoch: int, writer: WriterId) -> Ticket | None:
        """The writer has stopped for good.  The ticket when this ended it while LENT; None when it had ended, or was
        committed, before."""
        ticket = self._find(transfer_id, epoch, writer)
        if ticket.state is TicketState.REVOKING:
            self.prove_stopped(transfer_id)
        if ticket.state is not TicketState.LENT:
            return None
        self._close_lent(ticket)
        return ticket

    def give_up(self, transfer_id: str) -> Ticket | None:
        """The owner no longer wants the transfer: its blocks are quarantined and the writer must be asked to stop.  None
        when the writer need not be asked: the ticket is not LENT."""
        ticket = self._tickets.get(transfer_id)
        if ticket is None or ticket.state not in (TicketState.LENT, TicketState.VERIFYING):
            return None
        self._pool.quarantine(ticket.blocks)
        if ticket.state is TicketState.VERIFYING:  # until its check has ended
            ticket.state = TicketState.DISCARDING
            return None
        ticket.state = TicketState.REVOKING
        return ticket

    def is_pending(self, transfer_id: str) -> bool:
        """Whether the transfer may still be accepted."""
        ticket = self._tickets.get(transfer_id)
        return ticket is not None and ticket.state in (TicketState.LENT, TicketState.VERIFYING)

    def lent_to(self, writer: WriterId) -> list[Ticket]:
        """The writer's tickets that it has not committed yet."""
        return [t for t in self._tickets.values() if t.state is TicketState.LENT and t.writer == writer]

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

    def check_integrity(self, others: Set[int] = frozenset()) -> None:
        """Raises AssertionError unless the LENT and QUARANTINED blocks are exactly those that open tickets name, and
        ``others``, which none may name."""
        lent = self._blocks_in(TicketState.LENT, TicketState.VERIFYING)
        quarantined = self._blocks_in(TicketState.REVOKING, TicketState.DISCARDING)
        assert len(set(lent + quarantined)) == len(lent + quarantined), "two tickets share a block"
        assert others.isdisjoint(lent + quarantined), "a ticket and somebody else share a block"
        assert set(lent) == {*self._pool.lent_blocks()} - others, "the LENT blocks are not those of open tickets"
        assert set(quarantined) == {*self._pool.quarantined_blocks()} - others, (
            "the QUARANTINED blocks are not those of revoked tickets"
        )

    def _blocks_in(self, *states: TicketState) -> list[int]:
        return sorted(b for t in self._tickets.values() if t.state in states for b in t.blocks)

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

    def _require_whole(self, ticket: Ticket, written: Written) -> None:
        """Raises DoubtfulCommitError.  Of a last block that the prompt fills in part, writers send all bytes or those of
        the tokens only."""
        nbytes = (ticket.num_tokens * self._layout.token_nbytes, len(ticket.blocks) * self._layout.block_nbytes)
        asked = (len(ticket.blocks), ticket.num_tokens)
        if (written.num_blocks, written.num_tokens) != asked or written.num_bytes not in nbytes:
            raise DoubtfulCommitError(
                f"transfer {ticket.transfer_id} asked for {ticket.num_tokens} tokens of {self._layout.token_nbytes} bytes "
                f"in {len(ticket.blocks)} blocks, its writer says that it wrote {written.num_tokens} tokens in "
                f"{written.num_blocks} blocks and {written.num_bytes} bytes"
            )
        num_digests = len(ticket.blocks) if ticket.verify else 0
        if len(written.digests) != num_digests:
            raise DoubtfulCommitError(
                f"transfer {ticket.transfer_id} asked for {num_digests} block digests, "
                f"its writer sent {len(written.digests)}"
            )

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


def _mismatch(ticket: Ticket) -> ChecksumMismatchError:
    named = ", ".join(map(str, ticket.wrong[:NAME_WRONG_BLOCKS]))
    more = len(ticket.wrong) - NAME_WRONG_BLOCKS
    return ChecksumMismatchError(
        f"transfer {ticket.transfer_id}: block(s) {named}{f' and {more} more' if more > 0 else ''} of the prompt did not "
        f"arrive as {ticket.writer.worker_id}/{ticket.writer.incarnation} sent them"
    )
