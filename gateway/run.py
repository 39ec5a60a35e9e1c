"""The moving parts of one request in the gateway."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from gateway.candidates import Candidate
from gateway.job import Job, Trace
from gateway.line import Ticket
from gateway.request import Action, Event, Fail, Finish, RequestMachine, TokenCame
from gateway.retry_budget import Slice
from gateway.routing import Route
from gateway.turn import Turn
from kvferry.api.common.v1 import common_pb2
from kvferry.errors import DeadlineError
from services.runtime.backoff import Backoff

# When nobody else is there, workers that failed it are tried again after so long, and then ever more seldom.
FORGIVE_S = (2.0, 6.0)
# The first retry follows at once; of those that get no further, each waits longer for the next.
RETRY_BACKOFF_S = (0.1, 2.0)


class Decode(Protocol):
    """One attempt's, on its decode worker (gateway/decoding.py)."""

    def cancel(self) -> None: ...

    def keep_promise(self) -> None: ...


class TokenSink(Protocol):
    """Where an answer's tokens go."""

    def put(self, tokens: list[common_pb2.Token]) -> bool:
        """The next ones, at least one.  False: no more until ``room`` has returned.  Called in the event loop, must neither
        block nor raise."""

    async def room(self) -> bool:
        """Waits until more can be put.  False: it has all that it wants.  Raises kvferry.errors.Error."""


class Run:
    """Where a request's events wait, and what goes on for it."""

    def __init__(
        self, job: Job, trace: Trace, machine: RequestMachine, sink: TokenSink, turn: Turn,
        pass_on: Callable[[Run], None],
    ) -> None:  # fmt: skip
        """``pass_on`` sees to the events while they are tokens; must not raise.  Whatever else comes is for the request's
        task, which is woken."""
        self.machine = machine
        self.actions: deque[Action] = deque(machine.start())
        self.last: Finish | Fail | None = None
        self.sink = sink
        self.is_held = False  # until the sink has room
        self.whole_job = job
        self.job = job  # of the attempt
        self.sent: list[int] = []
        self.trace = trace
        self.retrying_since_s: float | None = None  # without a token meanwhile
        self.backoff = Backoff(*RETRY_BACKOFF_S)
        self.grudge = Backoff(*FORGIVE_S)
        self.spent: Slice | None = None  # of the retry budget, until it has paid
        self.routed = False
        self.ticket: Ticket[Run] | None = None  # while it waits in the line
        self._turn = turn
        self._pass_on = pass_on
        self.tasks: dict[int, asyncio.Task[None]] = {}  # prefill streams, by attempt
        self.decodes: dict[int, Decode] = {}  # by attempt
        self.timers: list[asyncio.TimerHandle] = []
        self.events: deque[Event | DeadlineError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_woken = False
        self._has_turn = False
        self._has_ended = False

    @property
    def route(self) -> Route:
        assert self.trace.route is not None, "streams open after routing"
        return self.trace.route

    @property
    def prefill(self) -> Candidate:
        assert self.route.prefill is not None, "a ticket comes when a writer was named"
        return self.route.prefill

    def put(self, event: Event | DeadlineError) -> None:
        """Tokens after the first wait for the turn, everything else is for now."""
        self.events.append(event)
        if type(event) is not TokenCame or event.token.index == 0:
            self.wake()
        elif not self._has_turn and not self._is_woken:
            self._has_turn = True
            self._turn.add(self._take_turn)

    def later(self, delay_s: float, act: Callable[[], None]) -> None:
        self.timers.append(asyncio.get_running_loop().call_later(delay_s, act))

    def put_later(self, delay_s: float, event: Event | DeadlineError) -> None:
        self.later(delay_s, partial(self.put, event))

    async def wait(self) -> None:
        """Until there are events to be seen to.  One task waits."""
        if not self._is_woken:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._is_woken = False

    def wake(self) -> None:
        self._is_woken = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take_turn(self) -> None:
        self._has_turn = False
        if self.is_held:
            self.wake()
        elif not self._is_woken and not self._has_ended:
            self._pass_on(self)

    def cancel(self, attempt: int) -> None:
        if task := self.tasks.get(attempt):
            task.cancel()
        if decode := self.decodes.get(attempt):
            decode.cancel()

    async def end(self) -> None:
        """Cancels whatever goes on.  From here on the sink gets nothing more."""
        self._has_ended = True
        for timer in self.timers:
            timer.cancel()
        for attempt in self.tasks.keys() | self.decodes.keys():
            self.cancel(attempt)
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        # They refer to it as it does to them.
        self.tasks.clear()
        self.decodes.clear()
        self.timers.clear()
