"""Cached blocks that other workers read here: pins granted, and ended by their readers or by their leases."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self
from uuid import uuid4

import structlog

from kvferry.errors import ConflictError, OverloadedError
from services.worker.pins import Pin, PinRefusedError, ReaderId, TooManyPinsError
from services.worker.worker import RETRY_AFTER_S, Worker

log = structlog.get_logger(__name__)


class Holdings:
    """Use as a context manager.  Owned by the event loop."""

    def __init__(self, worker: Worker, max_lifetime_s: float) -> None:
        self._worker = worker
        self._max_lifetime_s = max_lifetime_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def pin(self, hashes: list[bytes], reader: ReaderId, lifetime_s: float) -> Pin | None:
        """A pin on the longest prefix held, for ``lifetime_s`` but no longer than the worker grants (which it does for 0);
        None when there is nothing to pin.  Raises OverloadedError, ConflictError, or UnavailableError while draining."""
        worker = self._worker
        worker.require_taking_work()
        if worker.layout.tp > 1:
            name, ranks = worker.identity.worker_id, worker.layout.tp
            what = f"the blocks of worker {name} lie on {ranks} ranks, and nobody else reads those"
            raise ConflictError(what, reason="SEVERAL_RANKS")
        lifetime_s = min(lifetime_s or self._max_lifetime_s, self._max_lifetime_s)
        try:
            with worker.engine.exclusive():  # wakes it: an older pin may end by this
                return worker.pins.pin(uuid4().hex, hashes, reader, now_s=time.monotonic(), lifetime_s=lifetime_s)
        except TooManyPinsError as e:
            raise OverloadedError(str(e), reason="TOO_MANY_PINS", retry_after_s=RETRY_AFTER_S) from e
        except PinRefusedError as e:
            raise ConflictError(str(e), reason="PIN_REFUSED") from e
        finally:
            self._wait_for_next()

    def release(self, pin_id: str, reader: ReaderId) -> bool:
        """True when the pin stood until now.  Raises ConflictError when it is another reader's."""
        try:
            with self._worker.engine.exclusive():
                held = self._worker.pins.release(pin_id, reader, now_s=time.monotonic())
        except PinRefusedError as e:
            raise ConflictError(str(e), reason="PIN_REFUSED") from e
        self._wait_for_next()
        self._worker.router.changed.set()
        return held

    def _expire(self) -> None:
        with self._worker.engine.exclusive():
            late = self._worker.pins.expire(time.monotonic())
        for pin in late:
            log.info("pin_expired", reader=pin.reader.worker_id, pin_id=pin.id, blocks=len(pin.blocks))
        self._wait_for_next()
        self._worker.router.changed.set()

    def _wait_for_next(self) -> None:
        with self._worker.engine.exclusive(wake=False):
            next_s = self._worker.pins.next_expiry_s()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if next_s is None else self._loop.call_later(next_s - time.monotonic(), self._expire)
