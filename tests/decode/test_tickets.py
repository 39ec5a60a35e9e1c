"""Tickets against every interleaving of owner, writer and clock: nobody writes into a block that has a new owner."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.decode.tickets import Ticket, TicketBook, TicketRefusedError, TicketState, WriterId, Written
from services.engine.blocks import BlockPool
from services.engine.layout import KvLayout
from services.engine.sequence import SequenceId

WRITER = WriterId("prefill-0", 7)
LAYOUT = KvLayout("r", "float32", block_size=4, num_layers=2, num_kv_heads=1, head_dim=2)
NBYTES, TOKEN_NBYTES = LAYOUT.block_nbytes, LAYOUT.token_nbytes


def book(num_blocks: int = 8) -> tuple[BlockPool, TicketBook]:
    pool = BlockPool(num_blocks)
    return pool, TicketBook(pool, LAYOUT)


def open_ticket(pool: BlockPool, tickets: TicketBook, name: str, count: int, now_s: float = 0.0) -> Ticket:
    """For ``count`` blocks, of the last of which the prompt fills one token of four."""
    num_tokens = max(0, 4 * count - 3)
    return tickets.open(name, SequenceId(name), WRITER, 0, pool.lend(count), num_tokens, now_s=now_s, lifetime_s=10.0)


def commit(tickets: TicketBook, t: Ticket, now_s: float = 0.0, **changes: object) -> Ticket | None:
    written = Written(len(t.blocks), t.num_tokens, NBYTES * len(t.blocks))
    arguments = {"epoch": t.epoch, "writer": WRITER, "written": written}
    return tickets.commit(t.transfer_id, now_s=now_s, **{**arguments, **changes})  # type: ignore[arg-type]


class TicketMachine(RuleBasedStateMachine):
    """``writing``: tickets whose writer may still store bytes, whatever the owner believes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.tickets = book(10)
        self.now_s = 0.0
        self.count = 0
        self.writing: dict[str, Ticket] = {}
        self.all: list[Ticket] = []
        self.mine: list[int] = []

    @rule(count=st.integers(0, 4))
    def reserve(self, count: int) -> None:
        if count <= self.pool.num_available:
            self.count += 1
            ticket = open_ticket(self.pool, self.tickets, str(self.count), count, self.now_s)
            self.writing[ticket.transfer_id] = ticket
            self.all.append(ticket)

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(data=st.data())
    def writer_commits(self, data: st.DataObject) -> None:
        if not self.all:
            return
        ticket = data.draw(st.sampled_from(self.all))
        was = ticket.state
        self.writing.pop(ticket.transfer_id, None)  # it speaks after its last byte only
        try:
            accepted = commit(self.tickets, ticket, self.now_s)
        except TicketRefusedError:
            assert was is not TicketState.COMMITTED
            assert was is not TicketState.LENT or self.now_s > ticket.expires_s
            return
        if was is TicketState.LENT:
            assert accepted is ticket
            self.pool.settle(ticket.blocks)
            self.pool.release(ticket.blocks)
        else:
            assert (was, accepted) == (TicketState.COMMITTED, None)

    @rule(data=st.data())
    def writer_aborts(self, data: st.DataObject) -> None:
        if self.all:
            ticket = data.draw(st.sampled_from(self.all))
            self.writing.pop(ticket.transfer_id, None)
            was = ticket.state
            ended = self.tickets.abort_by_writer(ticket.transfer_id, ticket.epoch, WRITER)
            assert (ended is ticket) == (was is TicketState.LENT)

    @rule(data=st.data())
    def owner_gives_up(self, data: st.DataObject) -> None:
        if self.all:
            ticket = data.draw(st.sampled_from(self.all))
            was = ticket.state
            assert (self.tickets.give_up(ticket.transfer_id) is ticket) == (was is TicketState.LENT)

    @rule()
    def expire(self) -> None:
        for ticket in self.tickets.expired(self.now_s):
            assert self.tickets.give_up(ticket.transfer_id) is ticket

    @rule(data=st.data())
    def writer_crashes_and_its_end_is_proven(self, data: st.DataObject) -> None:
        if self.all:
            ticket = data.draw(st.sampled_from(self.all))
            self.writing.pop(ticket.transfer_id, None)
            self.tickets.prove_stopped(ticket.transfer_id)

    @rule(count=st.integers(1, 4))
    def use_blocks_oneself(self, count: int) -> None:
        self.pool.release(self.mine)
        self.mine = []
        if count <= self.pool.num_available:
            self.mine = self.pool.allocate(count)

    @invariant()
    def nobody_writes_into_a_block_with_a_new_owner(self) -> None:
        open_blocks = {b for t in self.all if t.state in (TicketState.LENT, TicketState.REVOKING) for b in t.blocks}
        for ticket in self.writing.values():
            assert set(ticket.blocks) <= open_blocks, "a writer may still write into blocks that were given back"
        assert not open_blocks & set(self.mine)

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity()
        self.tickets.check_integrity()


TestTickets = TicketMachine.TestCase
TestTickets.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epoch": 99}, "epoch"),
        ({"writer": WriterId("prefill-0", 8)}, "prefill-0/7"),
        ({"writer": WriterId("prefill-1", 7)}, "prefill-1/7"),
    ],
)
def test_a_commit_in_anothers_name_changes_nothing(changes: dict[str, object], says: str) -> None:
    pool, tickets = book()
    ticket = open_ticket(pool, tickets, "t", 3)
    with pytest.raises(TicketRefusedError, match=says):
        commit(tickets, ticket, **changes)
    assert commit(tickets, ticket) is ticket


def test_an_unknown_ticket_is_refused() -> None:
    _, tickets = book()
    with pytest.raises(TicketRefusedError, match="not known"):
        tickets.commit("x", 1, WRITER, Written(0, 0, 0), now_s=0)


@pytest.mark.parametrize("nbytes", [3 * NBYTES, 9 * TOKEN_NBYTES], ids=["whole blocks", "their tokens"])
def test_a_whole_commit_is_accepted(nbytes: int) -> None:
    pool, tickets = book()
    ticket = open_ticket(pool, tickets, "t", 3)
    assert commit(tickets, ticket, written=Written(3, 9, nbytes)) is ticket


@pytest.mark.parametrize(
    "written",
    [
        Written(2, 9, 3 * NBYTES),
        Written(3, 8, 3 * NBYTES),
        Written(3, 12, 3 * NBYTES),
        Written(3, 9, 3 * NBYTES - 1),
        Written(3, 9, 9 * TOKEN_NBYTES - 1),
        Written(3, 9, 10 * TOKEN_NBYTES),
        Written(3, 9, 2 * NBYTES),
        Written(0, 0, 0),
    ],
)
def test_an_incomplete_commit_ends_the_ticket(written: Written) -> None:
    pool, tickets = book()
    ticket = open_ticket(pool, tickets, "t", 3)
    with pytest.raises(TicketRefusedError, match=r"9 tokens of \d+ bytes in 3 blocks"):
        commit(tickets, ticket, written=written)
    assert ticket.state is TicketState.CLOSED
    assert pool.counts().free == 8


def test_a_late_commit_is_refused_and_proves_that_the_writer_stopped() -> None:
    pool, tickets = book()
    ticket = open_ticket(pool, tickets, "t", 3)
    tickets.give_up("t")
    assert pool.counts().quarantined == 3
    with pytest.raises(TicketRefusedError, match="given up"):
        commit(tickets, ticket)
    assert pool.counts().free == 8


def test_an_expired_commit_is_refused() -> None:
    pool, tickets = book()
    ticket = open_ticket(pool, tickets, "t", 3)
    with pytest.raises(TicketRefusedError, match="expired"):
        commit(tickets, ticket, now_s=10.5)
    assert pool.counts().free == 8


def test_epochs_are_never_reused() -> None:
    pool, tickets = book()
    epochs = []
    for i in range(5):
        ticket = open_ticket(pool, tickets, str(i), 1)
        epochs.append(ticket.epoch)
        tickets.abort_by_writer(ticket.transfer_id, ticket.epoch, WRITER)
    assert len(set(epochs)) == 5
