"""Every interleaving of a request's streams, their failures and its routes, over the real machine.

The world is a small immutable value; ``steps`` lists all that can happen next.  RequestMachine is the real one;
``Explorer`` stands for its shell (gateway/dispatch.py) and for the workers, which draw by position alone.  What a stream
brings keeps its order, and comes between that of other streams anywhere; it comes also when its attempt is over, for it may
have waited in the request's queue by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from gateway.candidates import WorkerKey
from gateway.request import (
    CancelAttempt,
    ChooseRoute,
    DecodeDone,
    Emit,
    Fail,
    Finish,
    NotRouted,
    OpenDecode,
    OpenPrefill,
    PrefillDone,
    RequestMachine,
    Routed,
    Stream,
    StreamFailed,
    TicketCame,
    TokenCame,
)
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import AbortedError, ConflictError, Error, InvalidRequestError, UnavailableError
from tests.exploration.memo import Memo, Violation
from tests.exploration.search import search

WRITER = WorkerKey("p", 1)
# What a stream may fail with; the second is not worth another attempt.
LOST, WRONG = UnavailableError("lost"), InvalidRequestError("wrong")
DISTRUSTED = ConflictError("distrusted", reason="PAIR_QUARANTINED")
GAVE_UP = AbortedError("the writer gave up")
NO_WORKER = UnavailableError("nobody can take it")
LATE = UnavailableError("the figures did not come")
EARLY = UnavailableError("ended its stream early")


@dataclass(frozen=True, slots=True)
class Setup:
    """``decoders``: decode workers; there is one prefill worker.  ``faults``: streams that fail, at most.
    ``first_from_decode``: as the machine has it."""

    num_tokens: int = 3
    decoders: int = 2
    faults: int = 2
    max_attempts: int = 3
    machine: type[RequestMachine] = RequestMachine
    first_from_decode: bool = False


class Attempt(NamedTuple):
    """``drawn``: of its tokens, those that the decode stream has brought.  ``written``: what its writer has done, 1 the
    first token, 2 the commit; ``told``: how much of that the stream has brought."""

    decode: WorkerKey
    prefill: WorkerKey | None
    base: int  # tokens that had left before
    opened: bool = False
    asked: bool = False  # the writer
    has_ticket: bool = False
    drawn: int = 0
    decode_ended: bool = False
    written: int = 0
    told: int = 0
    prefill_ended: bool = False
    cancelled: bool = False
    figures_failed: bool = False

    def is_held(self) -> bool:
        """Whether a worker still does something for it, or waits for somebody who does."""
        decodes = self.opened and not self.decode_ended
        writes = self.asked and not self.prefill_ended and self.written < 2
        return (decodes or writes) and not self.cancelled


class World(NamedTuple):
    machine: int  # which state of a RequestMachine
    num_sent: int
    excluded: frozenset[WorkerKey] | None  # while a route is to be chosen
    attempts: tuple[Attempt, ...]
    faults: int  # still to come
    may_fail: bool  # something happened of which the request may die
    ended: str = ""

    def is_over(self, index: int) -> bool:
        return bool(self.ended) or index + 1 < len(self.attempts) or self.attempts[index].cancelled


class Core:
    """The machine, told of events by name."""

    def __init__(self, machine: RequestMachine) -> None:
        self.machine = machine

    def on(self, event: str, *arguments: Any) -> Sequence[Any]:
        return self.machine.on(to_event(event, *arguments))


class Explorer:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.machines = Memo()
        self.decoders = [WorkerKey(f"d{number}", 1) for number in range(1, setup.decoders + 1)]

    def explore(self) -> int:
        """The number of states.  Raises Counterexample."""
        machine = self.setup.machine(
            self.setup.max_attempts, max_tokens=self.setup.num_tokens, first_from_decode=self.setup.first_from_decode
        )
        actions = machine.start()
        world = World(self.machines.add(Core(machine)), 0, None, (), self.setup.faults, False)
        return search(
            self._do(world, actions),
            self.steps,
            lambda world: bool(world.ended),
            otherwise="from here the request never ends",
        )

    def steps(self, world: World) -> Iterator[tuple[str, World, bool]]:
        if world.excluded is not None:
            yield from self._routes(world)
        for index in range(len(world.attempts)):
            yield from self._decode(world, index)
            yield from self._prefill(world, index)

    def _routes(self, world: World) -> Iterator[tuple[str, World, bool]]:
        assert world.excluded is not None
        for decode in self.decoders:
            for prefill in (None, WRITER):
                # Who waits with an answer that has begun forgives, in the end, those that failed it.
                if not world.num_sent and {decode, prefill} & world.excluded:
                    continue
                attempt = Attempt(decode, prefill, world.num_sent)
                routed = world._replace(attempts=(*world.attempts, attempt), excluded=None)
                label = f"it goes to {decode.worker_id}{' by the writer' if prefill else ''}"
                yield label, self._on(routed, "routed", decode, prefill), False
        nowhere = world._replace(excluded=None, may_fail=True)
        yield "nobody can take it", self._on(nowhere, "not routed"), False

    def _decode(self, world: World, index: int) -> Iterator[tuple[str, World, bool]]:
        a, n = world.attempts[index], index + 1
        if not a.opened or a.decode_ended:
            return
        if a.prefill and not a.has_ticket:
            yield f"{n}: the ticket comes", self._told(world, index, "ticket", has_ticket=True), False
        if a.prefill is None or a.written == 2:
            if a.base + a.drawn < self.setup.num_tokens:
                after = self._told(world, index, f"decode {a.drawn}", drawn=a.drawn + 1)
                yield f"{n}: the decode worker's token {a.drawn} comes", after, False
            else:
                after = self._told(world, index, "finished", decode_ended=True)
                yield f"{n}: the decode worker has finished", after, False
        elif a.prefill_ended:
            yield f"{n}: the writer gave up", self._told(world, index, "decode aborted", decode_ended=True), False
        for kind in ("lost", "wrong"):
            yield from self._fault(world, index, f"decode {kind}", decode_ended=True)
        if a.prefill and not a.has_ticket:
            yield from self._fault(world, index, "decode distrusted", decode_ended=True)

    def _prefill(self, world: World, index: int) -> Iterator[tuple[str, World, bool]]:
        a, n = world.attempts[index], index + 1
        if not a.asked or a.prefill_ended:
            return
        if a.written < 2 and not world.is_over(index):
            yield f"{n}: the writer goes on", _put(world, index, a._replace(written=a.written + 1)), False
        if a.told < a.written:
            event = ("prefill 0", "committed")[a.told]
            yield f"{n}: {event} comes", self._told(world, index, event, told=a.told + 1), False
        elif a.told == 2:
            yield f"{n}: the writer's stream ends", self._told(world, index, "prefill early", prefill_ended=True), False
        if a.decode_ended and a.drawn and not a.figures_failed:
            yield f"{n}: the figures are late", self._told(world, index, "figures late", figures_failed=True), False
        for kind in ("lost", "wrong"):
            yield from self._fault(world, index, f"prefill {kind}", prefill_ended=True)

    def _fault(self, world: World, index: int, event: str, **changes: Any) -> Iterator[tuple[str, World, bool]]:
        if not world.faults:
            return
        hurt = world
        if not world.is_over(index):
            hurt = world._replace(faults=world.faults - 1, may_fail=world.may_fail or event.endswith("wrong"))
        yield f"{index + 1}: {event}", self._told(hurt, index, event, **changes), True

    def _told(self, world: World, index: int, event: str, **changes: Any) -> World:
        """What comes next of an attempt that is over may come at any time, and is to change nothing: it stays the next."""
        a = world.attempts[index]
        after = world if world.is_over(index) else _put(world, index, a._replace(**changes))
        return self._on(after, event, index + 1, a.base)

    def _on(self, world: World, event: str, *arguments: Any) -> World:
        machine, actions = self.machines.call(world.machine, "on", event, *arguments)
        if world.ended and actions:
            raise Violation(f"after the end comes {_name(actions[0])}")
        return self._do(world._replace(machine=machine), actions)

    def _do(self, world: World, actions: Sequence[Any]) -> World:
        for action in actions:
            if world.ended:
                raise Violation(f"after the end comes {_name(action)}")
            world = self._act(world, action)
        return world

    def _act(self, world: World, action: Any) -> World:
        latest = len(world.attempts) - 1
        match action:
            case ChooseRoute(excluded=excluded, num_sent=num_sent):
                if num_sent != world.num_sent or num_sent >= self.setup.num_tokens:
                    raise Violation(f"it starts over behind {num_sent} tokens, {world.num_sent} have left")
                if latest >= 0 and excluded.isdisjoint({world.attempts[-1].decode, world.attempts[-1].prefill}):
                    raise Violation("whoever failed is not held against")
                self._require_given_back(world)
                return world._replace(excluded=excluded)
            case OpenDecode(attempt=attempt):
                return _put(world, attempt - 1, world.attempts[attempt - 1]._replace(opened=True))
            case OpenPrefill(attempt=attempt):
                if world.attempts[attempt - 1].cancelled or world.attempts[attempt - 1].asked:
                    raise Violation(f"the writer of attempt {attempt} is asked again")
                return _put(world, attempt - 1, world.attempts[attempt - 1]._replace(asked=True))
            case CancelAttempt(attempt=attempt):
                if attempt > len(world.attempts):  # it found no route
                    return world
                return _put(world, attempt - 1, world.attempts[attempt - 1]._replace(cancelled=True))
            case Emit(token=token):
                if (token.index, token.id) != (world.num_sent, 100 + world.num_sent):
                    raise Violation(f"token {token.index}, {token.id}, leaves behind {world.num_sent}")
                return world._replace(num_sent=world.num_sent + 1)
            case Finish():
                if world.num_sent != self.setup.num_tokens:
                    raise Violation(f"it finishes with {world.num_sent} tokens")
                last = world.attempts[-1]
                figures_may_come = last.told < 2 and not (last.figures_failed or last.prefill_ended)
                if last.prefill and figures_may_come and not last.cancelled:
                    raise Violation("it finishes without the writer's figures")
                self._require_given_back(world)
                return world._replace(ended="finished")
            case Fail():
                if not world.may_fail:
                    raise Violation("it fails, though another attempt was left")
                self._require_given_back(world)
                return world._replace(ended="failed")
        raise AssertionError(action)

    def _require_given_back(self, world: World) -> None:
        for number, attempt in enumerate(world.attempts, 1):
            if attempt.is_held():
                raise Violation(f"attempt {number} goes on at its workers")


@cache
def to_event(name: str, *arguments: Any) -> Any:
    match name:
        case "routed":
            return Routed(*arguments)
        case "not routed":
            return NotRouted(NO_WORKER)
    attempt, base = arguments
    kind, _, what = name.partition(" ")
    stream = Stream.DECODE if kind == "decode" else Stream.PREFILL
    match what or kind:
        case "ticket":
            return TicketCame(attempt, worker_pb2.Ticket())
        case "committed":
            return PrefillDone(attempt, worker_pb2.Committed())
        case "finished":
            return DecodeDone(attempt, worker_pb2.DecodeFinished(reason=common_pb2.FINISH_REASON_LENGTH))
        case index if index.isdecimal():
            return TokenCame(attempt, stream, common_pb2.Token(index=int(index), id=100 + base + int(index)))
    errors: dict[str, Error] = {
        "lost": LOST, "wrong": WRONG, "distrusted": DISTRUSTED, "aborted": GAVE_UP, "late": LATE, "early": EARLY,
    }  # fmt: skip
    return StreamFailed(attempt, stream, errors[what])


def _put(world: World, index: int, attempt: Attempt) -> World:
    return world._replace(attempts=(*world.attempts[:index], attempt, *world.attempts[index + 1 :]))


def _name(action: object) -> str:
    return type(action).__name__
