"""Every interleaving of a pool's owner, its writers, their messages and their deaths, over the real cores.

The world is a small immutable value; ``actions`` lists all that can happen next.  TicketBook, BlockPool and Ferry are the
real ones; ``Owner`` and the writers' part of ``Explorer`` stand for their shells (services/decode/reservations.py,
services/prefill/passage.py).

A message that was sent may arrive now, later, again or never, in any order; a lost one is one that never arrives.  What is
asked again until it is answered, such as whether a writer has stopped, is asked and answered in one action: an answer
that was lost is asked for again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from services.decode.tickets import Ticket, TicketBook, TicketRefusedError, TicketState, WriterId, Written
from services.engine.blocks import BlockPool
from services.engine.layout import KvLayout
from services.engine.sequence import SequenceId
from services.prefill.ferry import Commit, Ferry, FerryState, Stopped, Write
from tests.decode.memo import Memo, Violation

LIFETIME_S = 1.0
# One token a block.
LAYOUT = KvLayout(model_revision="r", dtype="float32", block_size=1, num_layers=1, num_kv_heads=1, head_dim=1)


class Counterexample(Exception):
    """The shortest way to a broken promise, one action a line."""


@dataclass(frozen=True, slots=True)
class Setup:
    """``sizes``: blocks that each request needs; ``attempts``: most tickets in all.  The first writer may be replaced
    ``restarts`` times.  With ``reuse_ids`` a request's tickets share one transfer id, and only their epochs differ.
    ``same_host``: the owner can see that a writer's process has ended; otherwise it believes the successor that answers.
    ``overlap``: a successor may answer before its predecessor has ended.  ``verify``: commits are checked before they are
    accepted."""

    num_blocks: int = 3
    sizes: tuple[int, ...] = (2, 1)
    attempts: int = 2
    writers: tuple[str, ...] = ("A", "B")
    restarts: int = 1
    owner_restarts: int = 1
    reuse_ids: bool = False
    same_host: bool = True
    overlap: bool = True
    verify: bool = False
    book: type[TicketBook] = TicketBook
    ferry: type[Ferry] = Ferry


class Writer(NamedTuple):
    worker_id: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.worker_id}/{self.incarnation}"


class Owner:
    """A decode worker's shell, without its loop: what ``Reservations`` does with a pool and its tickets."""

    def __init__(self, setup: Setup) -> None:
        self.pool = BlockPool(setup.num_blocks)
        self.book = setup.book(self.pool, LAYOUT)
        self.verify = setup.verify
        self.tickets: dict[tuple[str, int], Ticket] = {}
        self.borrowers: dict[int, tuple[str, int]] = {}  # of each block, the last
        self.active: dict[str, tuple[int, ...]] = {}

    def reserve(self, transfer: str, writer: Writer, count: int) -> tuple[int, tuple[int, ...]]:
        ticket = self.book.open(
            transfer,
            SequenceId(transfer),
            WriterId(*writer),
            0,
            self.pool.lend(count),
            count,
            now_s=0.0,
            lifetime_s=LIFETIME_S,
            verify=self.verify,
        )
        key = (transfer, ticket.epoch)
        self.tickets[key] = ticket
        self.borrowers |= dict.fromkeys(ticket.blocks, key)
        return ticket.epoch, ticket.blocks

    def commit(self, transfer: str, epoch: int, writer: Writer, blocks: tuple[int, ...], late: bool) -> bool | None:
        """Whether it was accepted, now or before; None while it is checked.  ``blocks`` are those that were really
        written."""
        written = Written(len(blocks), len(blocks), len(blocks) * LAYOUT.block_nbytes, blocks if self.verify else ())
        try:
            ticket = self.book.commit(
                transfer, epoch, WriterId(*writer), written, now_s=LIFETIME_S + 1 if late else 0.0
            )
        except TicketRefusedError:
            return False
        if ticket is not None and ticket.state is not TicketState.COMMITTED:
            return None
        if ticket is not None:
            if (ticket.epoch, ticket.blocks) != (epoch, blocks):
                raise Violation(f"the commit of epoch {epoch}, which wrote {blocks}, counts for blocks {ticket.blocks}")
            self.pool.settle(ticket.blocks)
            self.active[transfer] = ticket.blocks
        return True

    def conclude(self, transfer: str, epoch: int) -> bool:
        """The check has found what was sent."""
        ticket = self.tickets[transfer, epoch]
        try:
            self.book.conclude(transfer, ticket.digests)
        except TicketRefusedError:
            return False
        self.pool.settle(ticket.blocks)
        self.active[transfer] = ticket.blocks
        return True

    def abort(self, transfer: str, epoch: int, writer: Writer) -> None:
        with suppress(TicketRefusedError):
            self.book.abort_by_writer(transfer, epoch, WriterId(*writer))

    def give_up(self, transfer: str) -> None:
        self.book.give_up(transfer)

    def prove_stopped(self, transfer: str) -> None:
        self.book.prove_stopped(transfer)

    def finish(self, transfer: str) -> None:
        """The request has ended; its blocks become cache."""
        blocks = self.active.pop(transfer)
        for block in blocks:
            self.pool.remember(block, f"{transfer}/{block}".encode())
        self.pool.release(blocks)

    def view(self) -> View:
        self.pool.take_changes()
        self.pool.check_integrity()
        self.book.check_integrity()
        counts = self.pool.counts()
        if counts.free + counts.active + counts.cached + counts.lent + counts.quarantined != counts.total:
            raise Violation(f"the accounts do not add up: {counts}")
        lent = {*self.pool.lent_blocks(), *self.pool.quarantined_blocks()}

        def tickets_in(*states: TicketState) -> frozenset[tuple[str, int, Writer]]:
            return frozenset(
                (*key, Writer(t.writer.worker_id, t.writer.incarnation))
                for key, t in self.tickets.items()
                if t.state in states
            )

        return View(
            num_available=self.pool.num_available,
            lent=frozenset(transfer for transfer, _, _ in tickets_in(TicketState.LENT, TicketState.VERIFYING)),
            checked=tickets_in(TicketState.VERIFYING, TicketState.DISCARDING),
            revoking=tickets_in(TicketState.REVOKING),
            active=frozenset(self.active),
            loans=frozenset((self.borrowers[block], block) for block in lent),
            all_back=not (counts.active or counts.lent or counts.quarantined),
        )


class View(NamedTuple):
    """What the world needs to know of an owner.  ``loans``: (ticket, block) where a writer may store now."""

    num_available: int
    lent: frozenset[str]
    checked: frozenset[tuple[str, int, Writer]]
    revoking: frozenset[tuple[str, int, Writer]]
    active: frozenset[str]
    loans: frozenset[tuple[tuple[str, int], int]]
    all_back: bool


class Loan(NamedTuple):
    """A ticket on its way to its writer."""

    transfer: str
    epoch: int
    owner: int  # incarnation
    writer: Writer
    blocks: tuple[int, ...]


class Message(NamedTuple):
    """``ticket``, ``commit`` or ``abort``, about a loan."""

    kind: str
    loan: Loan


class Passage(NamedTuple):
    """A writer's work for one ticket."""

    loan: Loan
    ferry: int  # which state of a Ferry
    num_computed: int
    in_flight: tuple[tuple[int, ...], ...]  # blocks that stores may reach at any moment
    stored: frozenset[int]


class Process(NamedTuple):
    id: Writer
    alive: bool
    listening: bool
    passages: frozenset[Passage]
    used: frozenset[str]


class World(NamedTuple):
    owner: int  # which state of an Owner
    incarnation: int  # of the owner
    processes: tuple[Process, ...]
    messages: frozenset[Message]
    attempts: tuple[int, ...]  # of each request


class Step(NamedTuple):
    """``fault``: need not happen; without it everything must still come back."""

    label: str
    world: World
    fault: bool


class Explorer:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.owners = Memo()
        self.ferries = Memo()
        self.fresh_owner = self.owners.add(Owner(setup))

    def start(self) -> World:
        processes = [Process(Writer(name, 1), True, True, frozenset(), frozenset()) for name in self.setup.writers]
        return World(self.fresh_owner, 1, tuple(processes), frozenset(), (0,) * len(self.setup.sizes))

    def explore(self) -> int:
        """The number of states.  Raises Counterexample with the shortest trace to a broken promise, or to a state from
        which some block never comes back."""
        worlds = {self.start(): 0}
        came_from = [(0, "")]
        before: list[list[int]] = [[]]  # by steps that are no faults
        ends: list[int] = []  # where all blocks are back
        queue = deque(worlds)
        for number in count():
            if not queue:
                break
            world = queue.popleft()
            try:
                self.check(world)
                if self.view(world).all_back:
                    ends.append(number)
                for label, after, fault in self.actions(world):
                    found = worlds.setdefault(after, len(worlds))
                    if found == len(came_from):
                        came_from.append((number, label))
                        before.append([])
                        queue.append(after)
                    if not fault:
                        before[found].append(number)
            except Violation as e:
                raise Counterexample(_trace(came_from, number, str(e))) from e
        good = set(ends)
        while ends:
            fresh = set(before[ends.pop()]) - good
            good |= fresh
            ends += fresh
        for number in range(len(worlds)):  # in order of distance
            if number not in good:
                raise Counterexample(_trace(came_from, number, "from here some block never comes back"))
        return len(worlds)

    def view(self, world: World) -> View:
        view: View = self.owners.call(world.owner, "view")[1]
        return view

    def check(self, world: World) -> None:
        loans = self.view(world).loans
        for process in world.processes:
            for passage in process.passages:
                loan = passage.loan
                if loan.owner != world.incarnation:
                    continue  # its stores reach the memory of a process that is gone
                for block in (b for blocks in passage.in_flight for b in blocks):
                    if ((loan.transfer, loan.epoch), block) not in loans:
                        raise Violation(f"{loan.writer} may store into block {block}, which is no longer lent to it")

    def actions(self, world: World) -> Iterator[Step]:
        yield from self._of_the_owner(world)
        for message in world.messages:
            yield from self._delivery(world, message)
        for index, process in enumerate(world.processes):
            if process.alive:
                yield from self._of_a_writer(world, index)
        yield from self._of_fate(world)

    def _of_the_owner(self, world: World) -> Iterator[Step]:
        view = self.view(world)
        if sum(world.attempts) < self.setup.attempts:
            for request, size in enumerate(self.setup.sizes):
                if size > view.num_available or any(t.startswith(f"r{request}") for t in view.lent | view.active):
                    continue
                taken = view.revoking | view.checked
                if self.setup.reuse_ids and any(t.startswith(f"r{request}") for t, _, _ in taken):
                    continue
                for process in world.processes:
                    if process.listening:
                        yield self._reserve(world, request, size, process.id)
        for transfer in view.lent:
            yield self._call_owner(world, f"the owner gives {transfer} up", "give_up", transfer)
        for transfer in view.active:
            yield self._call_owner(world, f"{transfer} is answered, its blocks become cache", "finish", transfer)
        for transfer, epoch, writer in view.checked:
            yield from self._conclude(world, transfer, epoch, writer)
        for transfer, _, writer in view.revoking:
            yield from self._ask_to_stop(world, transfer, writer)

    def _reserve(self, world: World, request: int, size: int, writer: Writer) -> Step:
        attempt = world.attempts[request]
        transfer = f"r{request}" if self.setup.reuse_ids else f"r{request}.{world.incarnation}.{attempt}"
        owner, (epoch, blocks) = self.owners.call(world.owner, "reserve", transfer, writer, size)
        loan = Loan(transfer, epoch, world.incarnation, writer, blocks)
        attempts = (*world.attempts[:request], attempt + 1, *world.attempts[request + 1 :])
        after = world._replace(owner=owner, attempts=attempts, messages=world.messages | {Message("ticket", loan)})
        return Step(f"the owner lends blocks {blocks} to {writer} for {transfer}, epoch {epoch}", after, True)

    def _conclude(self, world: World, transfer: str, epoch: int, writer: Writer) -> Iterator[Step]:
        owner, accepted = self.owners.call(world.owner, "conclude", transfer, epoch)
        after = world._replace(owner=owner)
        label = f"the check of {transfer} ends, and it is {'accepted' if accepted else 'refused'}"
        yield Step(f"{label}; the answer is lost", after, False)
        for process in world.processes:
            for passage in process.passages:
                if (passage.loan.transfer, passage.loan.epoch, passage.loan.writer) == (transfer, epoch, writer):
                    yield Step(label, self._answer(after, passage.loan, accepted), False)

    def _ask_to_stop(self, world: World, transfer: str, writer: Writer) -> Iterator[Step]:
        for index, process in enumerate(world.processes):
            if process.id == writer and not process.alive and self.setup.same_host:
                label = f"the owner sees that {writer} has ended"
                yield self._call_owner(world, label, "prove_stopped", transfer)
            if process.id == writer and process.listening:
                label = f"{writer} is asked to stop {transfer}"
                passage = next((p for p in process.passages if p.loan.transfer == transfer), None)
                if passage is not None:
                    yield Step(label, self._drive(world, index, passage, "stop", "asked"), False)
                    continue
                told = process._replace(used=process.used | {transfer})
                after = world._replace(processes=_with(world.processes, index, told))
                yield self._call_owner(after, f"{label}, and has", "prove_stopped", transfer)
            if process.id.worker_id == writer.worker_id and process.id.incarnation > writer.incarnation:
                if not process.listening or self.setup.same_host:
                    continue
                label = f"{process.id} answers for {writer}"
                yield self._call_owner(world, label, "prove_stopped", transfer)

    def _delivery(self, world: World, message: Message) -> Iterator[Step]:
        loan = message.loan
        if message.kind == "ticket":
            for index, process in enumerate(world.processes):
                if process.id == loan.writer and process.listening and loan.transfer not in process.used:
                    ferry = self.setup.ferry(len(loan.blocks), 0, len(loan.blocks), 1)
                    passage = Passage(loan, self.ferries.add(ferry), 0, (), frozenset())
                    begun = process._replace(passages=process.passages | {passage}, used=process.used | {loan.transfer})
                    after = world._replace(processes=_with(world.processes, index, begun))
                    yield Step(f"{loan.writer} gets the ticket of {loan.transfer}", after, True)
            return
        label = f"the owner gets the {message.kind} of {loan.transfer}, epoch {loan.epoch}"
        if loan.owner != world.incarnation:
            if message.kind == "commit":
                yield Step(f"{label}, for an earlier incarnation", self._answer(world, loan, accepted=False), True)
            return
        if message.kind == "abort":
            yield self._call_owner(world, label, "abort", loan.transfer, loan.epoch, loan.writer)._replace(fault=True)
            return
        for late in (False, True):
            owner, accepted = self.owners.call(
                world.owner, "commit", loan.transfer, loan.epoch, loan.writer, loan.blocks, late
            )
            after = world._replace(owner=owner)
            does = {True: "accepts", False: "refuses", None: "checks"}[accepted]
            label_ = f"{label}, {'late, ' if late else ''}and {does} it"
            if accepted is None:
                yield Step(label_, after, True)
                continue
            yield Step(f"{label_}; the answer is lost", after, True)
            yield Step(label_, self._answer(after, loan, accepted), True)

    def _answer(self, world: World, loan: Loan, accepted: bool) -> World:
        for index, process in enumerate(world.processes):
            for passage in process.passages:
                if passage.loan == loan and self.ferries.get(passage.ferry, "state") is FerryState.COMMITTING:
                    if accepted:
                        return self._drive(world, index, passage, "committed")
                    return self._drive(world, index, passage, "stop", "refused")
        return world

    def _of_a_writer(self, world: World, index: int) -> Iterator[Step]:
        process = world.processes[index]
        name = process.id
        for passage in process.passages:
            transfer = passage.loan.transfer
            if passage.num_computed < len(passage.loan.blocks):
                label = f"{name} computes block {passage.num_computed} of {transfer}"
                yield Step(label, self._compute(world, index, passage), True)
            for blocks in set(passage.in_flight):
                rest = list(passage.in_flight)
                rest.remove(blocks)
                ended = passage._replace(in_flight=tuple(rest))
                moved = self._put(world, index, passage, ended)
                yield Step(
                    f"{name}'s write into {blocks} fails", self._drive(moved, index, ended, "write_failed", ""), False
                )
                stored = ended._replace(stored=ended.stored | set(blocks))
                moved = self._put(world, index, passage, stored)
                yield Step(f"{name} has written blocks {blocks}", self._drive(moved, index, stored, "written"), False)
            yield Step(f"{name} stops {transfer}", self._drive(world, index, passage, "stop", ""), True)

    def _compute(self, world: World, index: int, passage: Passage) -> World:
        done = passage.num_computed + 1
        world, passage = self._step_ferry(world, index, passage._replace(num_computed=done), "computed", done)
        if done == len(passage.loan.blocks):
            world, passage = self._step_ferry(world, index, passage, "drawn")
        return world

    def _drive(self, world: World, index: int, passage: Passage, event: str, *arguments: object) -> World:
        return self._step_ferry(world, index, passage, event, *arguments)[0]

    def _step_ferry(
        self, world: World, index: int, passage: Passage, event: str, *arguments: object
    ) -> tuple[World, Passage]:
        """What ``Passage._do`` does with a ferry's actions.  ``passage`` may differ from the one in the world by what was
        computed."""
        ferry, actions = self.ferries.call(passage.ferry, event, *arguments)
        moved = passage._replace(ferry=ferry)
        ended = self.ferries.get(ferry, "state") is FerryState.DONE
        messages = world.messages
        for action in actions or ():
            match action:
                case Write(first_token=first, end_token=end):
                    written = moved.loan.blocks[first:end]
                    moved = moved._replace(in_flight=tuple(sorted((*moved.in_flight, written))))
                case Commit():
                    if moved.stored != set(moved.loan.blocks):
                        raise Violation(f"{moved.loan.transfer} is committed before all of it was written")
                    messages |= {Message("commit", moved.loan)}
                case Stopped():
                    messages |= {Message("abort", moved.loan)}
                    ended = True
        if ended and moved.in_flight:
            raise Violation(f"{moved.loan.writer} says that it has stopped while it writes {moved.in_flight}")
        process = world.processes[index]
        others = frozenset(p for p in process.passages if p.loan != passage.loan)
        process = process._replace(passages=others if ended else others | {moved})
        return world._replace(processes=_with(world.processes, index, process), messages=messages), moved

    def _put(self, world: World, index: int, old: Passage, new: Passage) -> World:
        process = world.processes[index]
        process = process._replace(passages=process.passages - {old} | {new})
        return world._replace(processes=_with(world.processes, index, process))

    def _of_fate(self, world: World) -> Iterator[Step]:
        name = self.setup.writers[0]
        *_, (index, latest) = ((i, p) for i, p in enumerate(world.processes) if p.id.worker_id == name)
        may_restart = latest.id.incarnation <= self.setup.restarts
        for other, process in enumerate(world.processes):
            if process.id.worker_id == name and process.alive and (process is not latest or may_restart):
                dead = Process(process.id, False, False, frozenset(), frozenset())
                after = world._replace(processes=_with(world.processes, other, dead))
                yield Step(f"{process.id} ends", after, process is latest)
        if may_restart and (self.setup.overlap or not latest.alive):
            successor = Process(Writer(name, latest.id.incarnation + 1), True, True, frozenset(), frozenset())
            processes = _with(world.processes, index, latest._replace(listening=False))
            label = f"{successor.id} takes the place of {latest.id}"
            yield Step(label, world._replace(processes=(*processes, successor)), latest.alive)
        if world.incarnation <= self.setup.owner_restarts:
            after = world._replace(owner=self.fresh_owner, incarnation=world.incarnation + 1)
            yield Step("the owner dies and starts anew", after, True)

    def _call_owner(self, world: World, label: str, method: str, *arguments: object) -> Step:
        return Step(label, world._replace(owner=self.owners.call(world.owner, method, *arguments)[0]), False)


def _with(processes: tuple[Process, ...], index: int, process: Process) -> tuple[Process, ...]:
    return (*processes[:index], process, *processes[index + 1 :])


def _trace(came_from: list[tuple[int, str]], number: int, what: str) -> str:
    labels = []
    while number:
        number, label = came_from[number]
        labels.append(label)
    lines = [f"{place}. {label}" for place, label in enumerate(reversed(labels), 1)]
    return "\n".join([*lines, f"=> {what}"])
