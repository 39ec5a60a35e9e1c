"""Every interleaving of a pool's owner, its writers, their messages and their deaths, over the real cores.

The world is a small immutable value; ``actions`` lists all that can happen next.  TicketBook, BlockPool and Ferry are the
real ones; ``Owner`` and the writers' part of ``Explorer`` stand for their shells (services/decode/reservations.py,
services/prefill/passage.py).  Owners, processes and messages are numbered, so that a world is a few numbers, and what one
of them can do is found once, whatever the rest of the world is like.

A message that was sent may arrive now, later, again or never, in any order; a lost one is one that never arrives.  What is
asked again until it is answered, such as whether a writer has stopped, is asked and answered in one action: an answer
that was lost is asked for again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from services.decode.tickets import Ticket, TicketBook, TicketRefusedError, TicketState, WriterId, Written
from services.engine.blocks import BlockPool
from services.engine.layout import KvLayout
from services.engine.sequence import SequenceId
from services.prefill.ferry import Commit, Ferry, FerryState, Stopped, Write
from tests.exploration.memo import Memo, Numbers, Violation
from tests.exploration.search import search

LIFETIME_S = 1.0
# One token a block.
LAYOUT = KvLayout(model_revision="r", dtype="float32", block_size=1, num_layers=1, num_kv_heads=1, head_dim=1)


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
    """``messages``: a bit for each that was sent, or only just now."""

    owner: int  # which state of an Owner
    incarnation: int  # of the owner
    processes: tuple[int, ...]  # which state of a Process each
    messages: int
    attempts: tuple[int, ...]  # of each request


class Step(NamedTuple):
    """``fault``: need not happen; without it everything must still come back."""

    label: str
    world: World
    fault: bool


class Outcome(NamedTuple):
    """Of an action in a scene, which is a world without its messages: the scene then, and the messages that it sends."""

    label: str
    scene: int
    messages: int
    fault: bool


class Turn(NamedTuple):
    """What one process does: the state that it is in then, and what it sends."""

    label: str
    process: int
    messages: int
    fault: bool


class Explorer:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.owners = Memo()
        self.ferries = Memo()
        self.processes: Numbers[Process] = Numbers()
        self.messages: Numbers[Message] = Numbers()
        self.fresh_owner = self.owners.add(Owner(setup))
        self.scenes: Numbers[World] = Numbers()
        self.moves = cache(self._moves)
        self.deliveries = cache(self._deliveries)
        self.is_end = cache(self._is_end)
        self.view = cache(self._view)
        self.turns = cache(self._turns)
        self.answer = cache(self._answer)
        self.take = cache(self._take)
        self.stop = cache(self._stop)
        self.reservations = cache(self._reservations)
        self.endings = cache(self._endings)
        self.receptions = cache(self._receptions)
        self.fates = cache(self._fates)
        self.check = cache(self._check)

    def start(self) -> World:
        processes = [Process(Writer(name, 1), True, True, frozenset(), frozenset()) for name in self.setup.writers]
        return World(self.fresh_owner, 1, tuple(map(self.processes.of, processes)), 0, (0,) * len(self.setup.sizes))

    def explore(self) -> int:
        """The number of states.  Raises Counterexample with the shortest trace to a broken promise, or to a state from
        which some block never comes back."""
        start = (self.scenes.of(self.start()), 0)
        return search(
            start, self.steps, lambda state: self.is_end(state[0]), otherwise="from here some block never comes back"
        )

    def steps(self, state: tuple[int, int]) -> Iterator[tuple[str, tuple[int, int], bool]]:
        """``state``: a scene, and the messages that were sent."""
        scene, messages = state
        for label, after, sent, fault in self.actions(scene, messages):
            yield label, (after, messages | sent), fault

    def _view(self, owner: int) -> View:
        view: View = self.owners.call(owner, "view")[1]
        return view

    def _check(self, owner: int, incarnation: int, process: int) -> None:
        """Raises Violation."""
        loans = self.view(owner).loans
        for passage in self.processes[process].passages:
            loan = passage.loan
            if loan.owner != incarnation:
                continue  # its stores reach the memory of a process that is gone
            for block in (b for blocks in passage.in_flight for b in blocks):
                if ((loan.transfer, loan.epoch), block) not in loans:
                    raise Violation(f"{loan.writer} may store into block {block}, which is no longer lent to it")

    def _is_end(self, scene: int) -> bool:
        """Whether all blocks are back.  Raises Violation."""
        world = self.scenes[scene]
        for process in world.processes:
            self.check(world.owner, world.incarnation, process)
        return self.view(world.owner).all_back

    def actions(self, scene: int, messages: int) -> Iterator[Outcome]:
        """All that can happen next."""
        yield from self.moves(scene)
        while messages:
            lowest = messages & -messages
            messages ^= lowest
            yield from self.deliveries(scene, lowest)

    def _deliveries(self, scene: int, message: int) -> list[Outcome]:
        return list(map(self._outcome, self._delivery(self.scenes[scene], message.bit_length() - 1)))

    def _moves(self, scene: int) -> list[Outcome]:
        return list(map(self._outcome, self._without_messages(self.scenes[scene])))

    def _outcome(self, step: Step) -> Outcome:
        label, (owner, incarnation, processes, sent, attempts), fault = step
        return Outcome(label, self.scenes.of(World(owner, incarnation, processes, 0, attempts)), sent, fault)

    def _without_messages(self, world: World) -> Iterator[Step]:
        owner, incarnation, processes, _, attempts = world
        yield from self._of_the_owner(world)
        for index, process in enumerate(processes):
            for turn in self.turns(process):
                yield Step(turn.label, _moved(world, index, turn), turn.fault)
        for label, moved, fault in self.fates(processes):
            yield Step(label, World(owner, incarnation, moved, 0, attempts), fault)
        if incarnation <= self.setup.owner_restarts:
            yield Step(
                "the owner dies and starts anew", World(self.fresh_owner, incarnation + 1, processes, 0, attempts), True
            )

    def _of_the_owner(self, world: World) -> Iterator[Step]:
        owner, incarnation, processes, messages, attempts = world
        if sum(attempts) < self.setup.attempts:
            for label, after, sent, more in self.reservations(owner, incarnation, processes, attempts):
                yield Step(label, World(after, incarnation, processes, messages | sent, more), True)
        for label, after in self.endings(owner):
            yield Step(label, World(after, incarnation, processes, messages, attempts), False)
        view = self.view(owner)
        for transfer, epoch, writer in view.checked:
            yield from self._conclude(world, transfer, epoch, writer)
        for transfer, _, writer in view.revoking:
            yield from self._ask_to_stop(world, transfer, writer)

    def _reservations(
        self, owner: int, incarnation: int, processes: tuple[int, ...], attempts: tuple[int, ...]
    ) -> list[tuple[str, int, int, tuple[int, ...]]]:
        """What is said, the owner then, the ticket that is sent, and the attempts then."""
        view = self.view(owner)
        taken = view.revoking | view.checked
        found = []
        for request, size in enumerate(self.setup.sizes):
            if size > view.num_available or any(t.startswith(f"r{request}") for t in view.lent | view.active):
                continue
            if self.setup.reuse_ids and any(t.startswith(f"r{request}") for t, _, _ in taken):
                continue
            attempt = attempts[request]
            transfer = f"r{request}" if self.setup.reuse_ids else f"r{request}.{incarnation}.{attempt}"
            more = (*attempts[:request], attempt + 1, *attempts[request + 1 :])
            for process in map(self.processes.__getitem__, processes):
                if process.listening:
                    after, (epoch, blocks) = self.owners.call(owner, "reserve", transfer, process.id, size)
                    ticket = Message("ticket", Loan(transfer, epoch, incarnation, process.id, blocks))
                    label = f"the owner lends blocks {blocks} to {process.id} for {transfer}, epoch {epoch}"
                    found.append((label, after, self._bit(ticket), more))
        return found

    def _endings(self, owner: int) -> list[tuple[str, int]]:
        view = self.view(owner)
        return [
            *(
                (f"the owner gives {transfer} up", self.owners.call(owner, "give_up", transfer)[0])
                for transfer in view.lent
            ),
            *(
                (f"{t} is answered, its blocks become cache", self.owners.call(owner, "finish", t)[0])
                for t in view.active
            ),
        ]

    def _conclude(self, world: World, transfer: str, epoch: int, writer: Writer) -> Iterator[Step]:
        owner, accepted = self.owners.call(world.owner, "conclude", transfer, epoch)
        after = world._replace(owner=owner)
        label = f"the check of {transfer} ends, and it is {'accepted' if accepted else 'refused'}"
        yield Step(f"{label}; the answer is lost", after, False)
        for process in map(self.processes.__getitem__, world.processes):
            for passage in process.passages:
                if (passage.loan.transfer, passage.loan.epoch, passage.loan.writer) == (transfer, epoch, writer):
                    yield Step(label, self._answered(after, passage.loan, accepted), False)

    def _ask_to_stop(self, world: World, transfer: str, writer: Writer) -> Iterator[Step]:
        for index, number in enumerate(world.processes):
            process = self.processes[number]
            if process.id == writer and not process.alive and self.setup.same_host:
                label = f"the owner sees that {writer} has ended"
                yield self._prove_stopped(world, label, transfer)
            if process.id == writer and process.listening:
                turn, has_stopped = self.stop(number, transfer)
                after = _moved(world, index, turn)
                if has_stopped:
                    yield self._prove_stopped(after, f"{turn.label}, and has", transfer)
                else:
                    yield Step(turn.label, after, False)
            if process.id.worker_id == writer.worker_id and process.id.incarnation > writer.incarnation:
                if not process.listening or self.setup.same_host:
                    continue
                yield self._prove_stopped(world, f"{process.id} answers for {writer}", transfer)

    def _stop(self, number: int, transfer: str) -> tuple[Turn, bool]:
        """A process that is asked to stop; whether it had before."""
        process = self.processes[number]
        label = f"{process.id} is asked to stop {transfer}"
        passage = next((p for p in process.passages if p.loan.transfer == transfer), None)
        if passage is not None:
            return self._drive(label, False, process, passage, "stop", "asked"), False
        told = process._replace(used=process.used | {transfer})
        return Turn(label, self.processes.of(told), 0, False), True

    def _delivery(self, world: World, message: int) -> Iterator[Step]:
        kind, loan = self.messages[message]
        if kind == "ticket":
            for index, process in enumerate(world.processes):
                if (turn := self.take(process, message)) is not None:
                    yield Step(turn.label, _moved(world, index, turn), True)
            return
        if loan.owner != world.incarnation:
            if kind == "commit":
                label = f"the owner gets the commit of {loan.transfer}, epoch {loan.epoch}, for an earlier incarnation"
                yield Step(label, self._answered(world, loan, accepted=False), True)
            return
        for label, owner, accepted in self.receptions(world.owner, message):
            after = World(owner, world.incarnation, world.processes, world.messages, world.attempts)
            if accepted is None:
                yield Step(label, after, True)
                continue
            yield Step(f"{label}; the answer is lost", after, True)
            yield Step(label, self._answered(after, loan, accepted), True)

    def _take(self, number: int, message: int) -> Turn | None:
        """A ticket comes to a process, if it is for it."""
        process, loan = self.processes[number], self.messages[message].loan
        if process.id != loan.writer or not process.listening or loan.transfer in process.used:
            return None
        ferry = self.setup.ferry(len(loan.blocks), 0, len(loan.blocks), 1)
        passage = Passage(loan, self.ferries.add(ferry), 0, (), frozenset())
        begun = process._replace(passages=process.passages | {passage}, used=process.used | {loan.transfer})
        return Turn(f"{loan.writer} gets the ticket of {loan.transfer}", self.processes.of(begun), 0, True)

    def _receptions(self, owner: int, message: int) -> list[tuple[str, int, bool | None]]:
        """A commit or abort comes to the owner: the owner then, and whether it accepts it, if it answers now."""
        kind, loan = self.messages[message]
        label = f"the owner gets the {kind} of {loan.transfer}, epoch {loan.epoch}"
        if kind == "abort":
            return [(label, self.owners.call(owner, "abort", loan.transfer, loan.epoch, loan.writer)[0], None)]
        found = []
        for late in (False, True):
            after, accepted = self.owners.call(
                owner, "commit", loan.transfer, loan.epoch, loan.writer, loan.blocks, late
            )
            does = {True: "accepts", False: "refuses", None: "checks"}[accepted]
            found.append((f"{label}, {'late, ' if late else ''}and {does} it", after, accepted))
        return found

    def _answered(self, world: World, loan: Loan, accepted: bool) -> World:
        for index, process in enumerate(world.processes):
            if (turn := self.answer(process, loan, accepted)) is not None:
                return _moved(world, index, turn)
        return world

    def _answer(self, number: int, loan: Loan, accepted: bool) -> Turn | None:
        """The answer to its commit comes to a process, if it waits for it."""
        process = self.processes[number]
        for passage in process.passages:
            if passage.loan == loan and self.ferries.get(passage.ferry, "state") is FerryState.COMMITTING:
                event = ("committed",) if accepted else ("stop", "refused")
                return self._drive("", True, process, passage, *event)
        return None

    def _turns(self, number: int) -> list[Turn]:
        process = self.processes[number]
        name = process.id
        turns = []
        for passage in process.passages:
            transfer = passage.loan.transfer
            if passage.num_computed < len(passage.loan.blocks):
                label = f"{name} computes block {passage.num_computed} of {transfer}"
                turns.append(self._compute(label, process, passage))
            for blocks in set(passage.in_flight):
                rest = list(passage.in_flight)
                rest.remove(blocks)
                ended = passage._replace(in_flight=tuple(rest))
                label = f"{name}'s write into {blocks} fails"
                turns.append(self._drive(label, False, process, ended, "write_failed", ""))
                stored = ended._replace(stored=ended.stored | set(blocks))
                turns.append(self._drive(f"{name} has written blocks {blocks}", False, process, stored, "written"))
            turns.append(self._drive(f"{name} stops {transfer}", True, process, passage, "stop", ""))
        return turns

    def _compute(self, label: str, process: Process, passage: Passage) -> Turn:
        done = passage.num_computed + 1
        moved, ended, sent = self._step_ferry(passage._replace(num_computed=done), "computed", done)
        if done == len(passage.loan.blocks):
            moved, ended, more = self._step_ferry(moved, "drawn")
            sent |= more
        return self._turn(label, True, process, moved, ended, sent)

    def _drive(
        self, label: str, fault: bool, process: Process, passage: Passage, event: str, *arguments: object
    ) -> Turn:
        return self._turn(label, fault, process, *self._step_ferry(passage, event, *arguments))

    def _turn(self, label: str, fault: bool, process: Process, passage: Passage, ended: bool, sent: int) -> Turn:
        """``passage`` in place of the one for its loan."""
        others = frozenset(p for p in process.passages if p.loan != passage.loan)
        after = process._replace(passages=others if ended else others | {passage})
        return Turn(label, self.processes.of(after), sent, fault)

    def _step_ferry(self, passage: Passage, event: str, *arguments: object) -> tuple[Passage, bool, int]:
        """What ``Passage._do`` does with a ferry's actions: the passage then, whether it has ended, and what it sends."""
        ferry, actions = self.ferries.call(passage.ferry, event, *arguments)
        moved = passage._replace(ferry=ferry)
        ended = self.ferries.get(ferry, "state") is FerryState.DONE
        sent = 0
        for action in actions or ():
            match action:
                case Write(first_token=first, end_token=end):
                    written = moved.loan.blocks[first:end]
                    moved = moved._replace(in_flight=tuple(sorted((*moved.in_flight, written))))
                case Commit():
                    if moved.stored != set(moved.loan.blocks):
                        raise Violation(f"{moved.loan.transfer} is committed before all of it was written")
                    sent |= self._bit(Message("commit", moved.loan))
                case Stopped():
                    sent |= self._bit(Message("abort", moved.loan))
                    ended = True
        if ended and moved.in_flight:
            raise Violation(f"{moved.loan.writer} says that it has stopped while it writes {moved.in_flight}")
        return moved, ended, sent

    def _fates(self, numbers: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], bool]]:
        """What becomes of the processes."""
        processes = [self.processes[number] for number in numbers]
        name = self.setup.writers[0]
        *_, (index, latest) = ((i, p) for i, p in enumerate(processes) if p.id.worker_id == name)
        may_restart = latest.id.incarnation <= self.setup.restarts
        found = []
        for other, process in enumerate(processes):
            if process.id.worker_id == name and process.alive and (process is not latest or may_restart):
                dead = self.processes.of(Process(process.id, False, False, frozenset(), frozenset()))
                found.append((f"{process.id} ends", _with(numbers, other, dead), process is latest))
        if may_restart and (self.setup.overlap or not latest.alive):
            successor = Process(Writer(name, latest.id.incarnation + 1), True, True, frozenset(), frozenset())
            deaf = _with(numbers, index, self.processes.of(latest._replace(listening=False)))
            label = f"{successor.id} takes the place of {latest.id}"
            found.append((label, (*deaf, self.processes.of(successor)), latest.alive))
        return found

    def _prove_stopped(self, world: World, label: str, transfer: str) -> Step:
        owner = self.owners.call(world.owner, "prove_stopped", transfer)[0]
        return Step(label, world._replace(owner=owner), False)

    def _bit(self, message: Message) -> int:
        return 1 << self.messages.of(message)


def _with(processes: tuple[int, ...], index: int, process: int) -> tuple[int, ...]:
    return (*processes[:index], process, *processes[index + 1 :])


def _moved(world: World, index: int, turn: Turn) -> World:
    owner, incarnation, processes, messages, attempts = world
    return World(owner, incarnation, _with(processes, index, turn.process), messages | turn.messages, attempts)
