"""Tickets in every interleaving: owner, writers, messages lost, repeated and late, deaths.  And cores that are broken on
purpose, to see that each fault of theirs is found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from services.decode.tickets import Ticket, TicketBook, TicketState
from services.prefill.ferry import Action, Commit, Ferry, FerryState, Stopped
from tests.decode.exploration import Explorer, Setup
from tests.exploration.search import Counterexample


@pytest.mark.parametrize(
    ("setup", "at_least"),
    [
        pytest.param(Setup(owner_restarts=0), 60_000, id="two writers, one of which dies"),
        pytest.param(Setup(writers=("A",)), 50_000, id="writer and owner die"),
        pytest.param(Setup(writers=("A",), reuse_ids=True), 40_000, id="only epochs tell tickets apart"),
        pytest.param(Setup(writers=("A",), owner_restarts=0, verify=True), 10_000, id="commits are checked"),
        pytest.param(
            Setup(writers=("A",), attempts=1, same_host=False, overlap=False), 500, id="a writer on another host"
        ),
    ],
)
def test_nobody_writes_into_a_block_that_is_not_lent_to_it_and_every_block_comes_back(
    setup: Setup, at_least: int
) -> None:
    num_states = Explorer(setup).explore()
    print(f"{num_states} states")  # noqa: T201
    assert num_states >= at_least, "the exploration does not reach what it used to"


class FreesWithoutProof(TicketBook):
    def give_up(self, transfer_id: str) -> Ticket | None:
        ticket = super().give_up(transfer_id)
        self.prove_stopped(transfer_id)
        return ticket


class IgnoresEpochs(TicketBook):
    def commit(self, transfer_id: str, epoch: int, *arguments: Any, **options: Any) -> Ticket | None:
        ticket = self._tickets.get(transfer_id)
        return super().commit(transfer_id, ticket.epoch if ticket else epoch, *arguments, **options)


class TrustsAnyAbort(TicketBook):
    """An abort in the name of whichever process holds the ticket."""

    def abort_by_writer(self, transfer_id: str, epoch: int, *arguments: Any) -> Ticket | None:
        ticket = self._tickets.get(transfer_id)
        if ticket is None:
            return None
        return super().abort_by_writer(transfer_id, ticket.epoch, ticket.writer)


class HearsNoProof(TicketBook):
    def prove_stopped(self, transfer_id: str) -> bool:
        return False


class FreesWhatIsRead(TicketBook):
    """Blocks of a request that was cancelled, under the check that reads them."""

    def give_up(self, transfer_id: str) -> Ticket | None:
        ticket = super().give_up(transfer_id)
        given_up = self._tickets.get(transfer_id)
        if given_up is not None and given_up.state is TicketState.DISCARDING:
            self._pool.restore(given_up.blocks)
        return ticket


class SaysStoppedTooSoon(Ferry):
    def stop(self, reason: str) -> list[Action]:
        if not super().stop(reason):
            return []
        self.state = FerryState.STOPPED
        return [Stopped(reason)]


class CommitsTooSoon(Ferry):
    def drawn(self) -> list[Action]:
        self.state = FerryState.COMMITTING
        return [Commit(1, 1)]


def explored(**broken: Any) -> Sequence[str]:
    """The lines of the shortest counterexample."""
    with pytest.raises(Counterexample) as found:
        Explorer(Setup(**broken)).explore()
    print(found.value)  # noqa: T201
    return str(found.value).splitlines()


@pytest.mark.parametrize(
    ("broken", "num_actions", "says"),
    [
        ({"book": FreesWithoutProof}, 4, "which is no longer lent to it"),
        ({"book": IgnoresEpochs, "reuse_ids": True}, 6, "counts for blocks"),
        ({"book": TrustsAnyAbort, "reuse_ids": True}, 8, "which is no longer lent to it"),
        ({"book": HearsNoProof, "attempts": 1}, 1, "from here some block never comes back"),
        ({"book": FreesWhatIsRead, "verify": True}, 6, "the QUARANTINED blocks are not those"),
        ({"ferry": SaysStoppedTooSoon}, 3, "says that it has stopped while it writes"),
        ({"ferry": CommitsTooSoon}, 2, "committed before all of it was written"),
    ],
    ids=lambda value: next(iter(value.values())).__name__ if isinstance(value, dict) else "",
)
def test_a_broken_core_is_found(broken: dict[str, Any], num_actions: int, says: str) -> None:
    *actions, verdict = explored(**broken)
    assert says in verdict
    assert len(actions) == num_actions


def test_a_successor_proves_its_predecessors_end_only_where_they_do_not_overlap() -> None:
    """On another host the end of a process cannot be seen; the answer of a successor counts as proof there, which holds
    as long as a worker is started after the one before it has ended."""
    *actions, verdict = explored(same_host=False, overlap=True)
    assert "A/1 may store into block" in verdict
    assert any("A/2 answers for A/1" in action for action in actions)
