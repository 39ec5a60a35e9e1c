"""Carries the engine's events from its thread to whoever waits for them in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from services.engine.blocks import CacheChange
from services.engine.engine import StepTime
from services.engine.sequence import Event, SequenceId


class Subscriber(Protocol):
    """Called in the event loop; must not block or raise."""

    def on_step(self, step: StepTime) -> None:
        """A step that computed for this sequence took so long; comes before the step's events."""

    def on_event(self, event: Event) -> None: ...


class EventRouter:
    """One per worker.  ``publish`` may be called from any thread, the rest from the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Set whenever a sequence may have ended; who waits for that clears it.
        self.changed = asyncio.Event()
        self.on_cache_changes: Callable[[list[CacheChange]], None] = lambda changes: None
        self._loop = loop
        self._subscribers: dict[SequenceId, Subscriber] = {}

    def subscribe(self, id_: SequenceId, subscriber: Subscriber) -> None:
        assert id_ not in self._subscribers, f"sequence {id_} has a subscriber"
        self._subscribers[id_] = subscriber

    def unsubscribe(self, id_: SequenceId) -> None:
        self._subscribers.pop(id_, None)
        self.changed.set()

    def publish(self, events: list[Event], changes: list[CacheChange], step: StepTime) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, events, changes, step)
        except RuntimeError:
            if not self._loop.is_closed():  # closed: the worker has shut down while a step ran, nobody waits any more
                raise

    def deliver(self, events: list[Event]) -> None:
        """Events that came about in the loop itself."""
        for event in events:
            if subscriber := self._subscribers.get(event.id):
                subscriber.on_event(event)

    def _deliver(self, events: list[Event], changes: list[CacheChange], step: StepTime) -> None:
        for id_ in step.sequence_ids:
            if subscriber := self._subscribers.get(id_):
                subscriber.on_step(step)
        self.deliver(events)
        self.changed.set()
        if changes:
            self.on_cache_changes(changes)
