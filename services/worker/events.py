"""Carries the engine's events from its thread to whoever waits for them in the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

import structlog

from kvferry.errors import Error
from services.engine.blocks import CacheChange
from services.engine.engine import StepTime
from services.engine.sequence import Event, SequenceId, StepFailed

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Subscriber(Protocol):
    """Called in the event loop; must not block or raise."""

    def on_step(self, step: StepTime) -> None:
        """A step that computed for this sequence took so long; comes before the step's events."""

    def on_event(self, event: Event) -> None: ...


class EventRouter:
    """One per worker.  It listens to the engine on whatever thread; everything else happens in the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Set whenever a sequence may have ended; who waits for that clears it.
        self.changed = asyncio.Event()
        self.died: asyncio.Future[None] = loop.create_future()
        # Looked at, for a worker that ends while it starts does not get as far as to await it.
        self.died.add_done_callback(lambda died: died.cancelled() or died.exception())
        self.tell_directory: Callable[[list[CacheChange]], None] = lambda changes: None
        self._loop = loop
        self._subscribers: dict[SequenceId, Subscriber] = {}
        self._calls: deque[Callable[[], object]] = deque()
        self._woken = False

    def subscribe(self, id_: SequenceId, subscriber: Subscriber) -> None:
        assert id_ not in self._subscribers, f"sequence {id_} has a subscriber"
        self._subscribers[id_] = subscriber

    def unsubscribe(self, id_: SequenceId) -> None:
        self._subscribers.pop(id_, None)
        self.changed.set()

    def on_events(self, events: list[Event], step: StepTime) -> None:
        self._call(lambda: self._deliver_step(events, step))

    def on_started(self, events: list[Event]) -> None:
        self._call(lambda: self.deliver(events))

    def on_cache_changes(self, changes: list[CacheChange]) -> None:
        self._call(lambda: self.tell_directory(changes))

    def on_copied(self) -> None:
        self._call(self.changed.set)

    def on_death(self, error: BaseException) -> None:
        def end() -> None:
            if self.died.done():
                return
            if isinstance(error, Error):  # says all that there is to say
                self.died.set_exception(error)
            else:
                died = RuntimeError(f"the engine died: {error!r}")  # a future takes no StopIteration
                died.__cause__ = error
                self.died.set_exception(died)

        self._call(end)

    def deliver(self, events: list[Event]) -> None:
        """Events that came about in the loop itself."""
        for event in events:
            if subscriber := self._subscribers.get(event.id):
                self._guarded(event.id, subscriber.on_event, event)

    def _deliver_step(self, events: list[Event], step: StepTime) -> None:
        for id_ in step.sequence_ids:
            if subscriber := self._subscribers.get(id_):
                self._guarded(id_, subscriber.on_step, step)
        self.deliver(events)
        self.changed.set()

    def _guarded(self, id_: SequenceId, call: Callable[[T], None], argument: T) -> None:
        """A bug in one request's subscriber must not cost the others their events."""
        try:
            call(argument)
        except Exception:
            log.exception("subscriber_failed", sequence=id_)
            if subscriber := self._subscribers.pop(id_, None):
                with suppress(Exception):
                    subscriber.on_event(StepFailed(id_, "an internal error; the worker's log has the details"))

    def _run_calls(self) -> None:
        self._woken = False  # before looking: what comes from here on wakes the loop again
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception:  # the others are for somebody else
                log.exception("event_lost")

    def _call(self, call: Callable[[], object]) -> None:
        """Wakes the loop, which costs the engine a system call, only where it has not been woken yet."""
        self._calls.append(call)
        if self._woken:
            return
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._run_calls)
        except RuntimeError:
            if not self._loop.is_closed():  # closed: the worker has shut down while a step ran, nobody waits any more
                raise
