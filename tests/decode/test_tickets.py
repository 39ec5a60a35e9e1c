"""Tickets against every interleaving of owner, writer and clock: nobody writes into a block that has a new owner."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

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
from services.engine.blocks import BlockPool
from services.engine.layout import KvLayout
from services.engine.sequence import SequenceId

WRITER = WriterId("prefill-0", 7)
LAYOUT = KvLayout("r", "float32", block_size=4, num_layers=2, num_kv_heads=1, head_dim=2)
NBYTES, TOKEN_NBYTES = LAYOUT.block_nbytes, LAYOUT.token_nbytes


def book(num_blocks: int = 8) -> tuple[BlockPool, TicketBook]:
    pool = BlockPool(num_blocks)
    return pool, TicketBook(pool, LAYOUT)


def open_ticket(
    pool: BlockPool, tickets: TicketBook, name: str, count: int, now_s: float = 0.0, verify: bool = False
) -> Ticket:
    """For ``count`` blocks, of the last of which the prompt fills one token of four."""
    num_tokens = max(0, 4 * count - 3)
    return tickets.open(
        name, SequenceId(name), WRITER, 2, pool.lend(count), num_tokens, now_s=now_s, lifetime_s=10.0, verify=verify
    )


def sent(ticket: Ticket) -> tuple[int, ...]:
    """The digests that an honest writer commits with."""
    return tuple(1000 + block for block in ticket.blocks) if ticket.verify else ()


def commit(tickets: TicketBook, t: Ticket, now_s: float = 0.0, **changes: object) -> Ticket | None:
    written = Written(len(t.blocks), t.num_tokens, NBYTES * len(t.blocks), sent(t))
    arguments = {"epoch": t.epoch, "writer": WRITER, "written": written}
    return tickets.commit(t.transfer_id, now_s=now_s, **{**arguments, **changes})  # type: ignore[arg-type]


class TicketMachine(RuleBasedStateMachine):
    """``writing``: tickets whose writer may still store bytes, whatever the owner believes.  ``reading``: tickets whose
    blocks are being digested, whatever became of their requests."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.tickets = book(10)
        self.now_s = 0.0
        self.count = 0
        self.writing: dict[str, Ticket] = {}
        self.reading: dict[str, Ticket] = {}
        self.all: list[Ticket] = []
        self.mine: list[int] = []

    @rule(count=st.integers(0, 4), verify=st.booleans())
    def reserve(self, count: int, verify: bool) -> None:
        if count <= self.pool.num_available:
            self.count += 1
            ticket = open_ticket(self.pool, self.tickets, str(self.count), count, self.now_s, verify)
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
            assert was in (TicketState.LENT, TicketState.REVOKING, TicketState.CLOSED)
            assert was is not TicketState.LENT or self.now_s > ticket.expires_s
            return
        if was is TicketState.COMMITTED:
            assert accepted is None
            return
        assert accepted is ticket
        if was is TicketState.LENT and ticket.verify:
            assert ticket.state is TicketState.VERIFYING
            self.reading[ticket.transfer_id] = ticket
        elif was is TicketState.LENT:
            self.settle(ticket)
        else:
            assert was is ticket.state, "a commit that is repeated while it is checked changes nothing"
            assert ticket.transfer_id in self.reading

    @rule(data=st.data())
    def writer_commits_while_it_writes(self, data: st.DataObject) -> None:
        """It counts what it has written so far."""
        counted = [t for t in self.all if t.transfer_id in self.writing and t.blocks]
        if not counted:
            return
        ticket = data.draw(st.sampled_from(counted))
        was = ticket.state
        written = Written(len(ticket.blocks) - 1, ticket.num_tokens, NBYTES * len(ticket.blocks), sent(ticket))
        with pytest.raises(TicketRefusedError) as refused:
            commit(self.tickets, ticket, self.now_s, written=written)
        assert ticket.state is was
        if was is TicketState.LENT:
            assert isinstance(refused.value, DoubtfulCommitError)
            assert self.tickets.give_up(ticket.transfer_id) is ticket

    def settle(self, ticket: Ticket) -> None:
        assert ticket.state is TicketState.COMMITTED
        self.pool.settle(ticket.blocks)
        self.pool.release(ticket.blocks)

    @rule(data=st.data(), what=st.sampled_from(["equal", "damaged", "failed"]))
    def check_ends(self, data: st.DataObject, what: str) -> None:
        if not self.reading:
            return
        ticket = self.reading.pop(data.draw(st.sampled_from(sorted(self.reading))))
        was, found = ticket.state, list(sent(ticket))
        if what == "damaged" and found:
            found[data.draw(st.integers(0, len(found) - 1))] += 1
        damaged = found != list(sent(ticket))
        verdict: Ticket | TicketRefusedError
        try:
            verdict = self.tickets.conclude(ticket.transfer_id, None if what == "failed" else found)
        except TicketRefusedError as e:
            verdict = e
        if damaged:
            assert isinstance(verdict, ChecksumMismatchError)
        elif what == "failed" or was is TicketState.DISCARDING:
            assert type(verdict) is TicketRefusedError
        else:
            assert verdict is ticket
            self.settle(ticket)
            return
        assert ticket.state is TicketState.CLOSED

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
            assert ticket.state is not TicketState.VERIFYING

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
        ended = (TicketState.COMMITTED, TicketState.CLOSED)
        open_blocks = {b for t in self.all if t.state not in ended for b in t.blocks}
        for ticket in self.writing.values():
            assert set(ticket.blocks) <= open_blocks, "a writer may still write into blocks that were given back"
        for ticket in self.reading.values():
            assert set(ticket.blocks) <= open_blocks, "a check still reads blocks that were given back"
        assert not open_blocks & set(self.mine)

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity()
        self.tickets.check_integrity()


TestTickets = TicketMachine.TestCase
TestTickets.settings = settings(max_examples=80, stateful_step_count=40)


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
def test_an_incomplete_commit_is_refused_and_proves_nothing(written: Written) -> None:
    pool, tickets = book()
    ticket = open_ticket(pool, tickets, "t", 3)
    with pytest.raises(DoubtfulCommitError, match=r"9 tokens of \d+ bytes in 3 blocks"):
        commit(tickets, ticket, written=written)
    assert (ticket.state, pool.counts().lent) == (TicketState.LENT, 3)
    tickets.give_up("t")
    with pytest.raises(DoubtfulCommitError):
        commit(tickets, ticket, written=written)
    assert pool.counts().quarantined == 3
    tickets.prove_stopped("t")
    with pytest.raises(TicketRefusedError, match="given up"):
        commit(tickets, ticket, written=written)


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


def verifying(count: int = 3) -> tuple[BlockPool, TicketBook, Ticket]:
    pool, tickets = book()
    ticket = open_ticket(pool, tickets, "t", count, verify=True)
    assert commit(tickets, ticket) is ticket
    assert ticket.state is TicketState.VERIFYING
    return pool, tickets, ticket


def test_a_verified_commit_is_accepted_after_its_check_only() -> None:
    pool, tickets, ticket = verifying()
    assert pool.counts().lent == 3
    assert tickets.is_pending("t")
    assert tickets.conclude("t", sent(ticket)) is ticket
    assert ticket.state is TicketState.COMMITTED
    assert commit(tickets, ticket) is None, "repeated"


def test_a_mismatch_names_the_blocks_of_the_prompt_and_closes_the_ticket() -> None:
    pool, tickets, ticket = verifying()
    found = [digest + (i != 1) for i, digest in enumerate(sent(ticket))]
    with pytest.raises(
        ChecksumMismatchError, match=r"block\(s\) 2, 4 of the prompt did not arrive as prefill-0/7 sent"
    ) as first:
        tickets.conclude("t", found)
    assert pool.counts().free == 8
    with pytest.raises(ChecksumMismatchError) as again:
        commit(tickets, ticket)
    assert str(again.value) == str(first.value), "a repeated commit is answered as the first one was"


def test_a_message_about_a_long_prompt_stays_short() -> None:
    pool, tickets = book(100)
    ticket = open_ticket(pool, tickets, "t", 100, verify=True)
    commit(tickets, ticket)
    with pytest.raises(ChecksumMismatchError, match="2, 3, 4, 5, 6, 7, 8, 9 and 92 more of the prompt did not"):
        tickets.conclude("t", [0] * 100)


@pytest.mark.parametrize("digests", [(), (1, 2), (1, 2, 3, 4)])
def test_a_commit_without_a_digest_of_each_block_is_refused(digests: tuple[int, ...]) -> None:
    pool, tickets = book()
    ticket = open_ticket(pool, tickets, "t", 3, verify=True)
    with pytest.raises(DoubtfulCommitError, match=f"asked for 3 block digests, its writer sent {len(digests)}"):
        commit(tickets, ticket, written=Written(3, 9, 3 * NBYTES, digests))
    assert (ticket.state, pool.counts().lent) == (TicketState.LENT, 3)


def test_blocks_of_a_cancelled_request_stay_until_their_check_has_ended() -> None:
    pool, tickets, ticket = verifying()
    assert tickets.give_up("t") is None, "the writer has stopped already: nobody has to ask it"
    assert not tickets.prove_stopped("t")
    assert tickets.abort_by_writer("t", ticket.epoch, WRITER) is None
    assert pool.counts().quarantined == 3
    with pytest.raises(TicketRefusedError, match="given up"):
        tickets.conclude("t", sent(ticket))
    assert pool.counts().free == 8


def test_damage_counts_although_the_request_was_cancelled() -> None:
    _, tickets, ticket = verifying()
    tickets.give_up("t")
    with pytest.raises(ChecksumMismatchError):
        tickets.conclude("t", [0, 0, 0])
    assert ticket.wrong == (2, 3, 4)


def test_a_writer_that_no_longer_waits_for_the_verdict_changes_nothing() -> None:
    _, tickets, ticket = verifying()
    assert tickets.abort_by_writer("t", ticket.epoch, WRITER) is None
    assert tickets.expired(1e9) == []
    assert tickets.conclude("t", sent(ticket)) is ticket


def test_only_the_writers_uncommitted_tickets_are_lent_to_it() -> None:
    pool, tickets, _ = verifying(1)
    lent = open_ticket(pool, tickets, "lent", 1)
    revoked = open_ticket(pool, tickets, "revoked", 1)
    tickets.give_up(revoked.transfer_id)
    assert tickets.lent_to(WRITER) == [lent]
    assert tickets.lent_to(WriterId("prefill-0", 8)) == []
