"""Ctrl-C and its relatives, made dependable."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Being asked to end, by Ctrl-C, SIGTERM or SIGHUP, without losing the request.

    While entered, each of the signals raises KeyboardInterrupt in the main thread, where this must be used.

    An exception can be swallowed by whichever destructor it happens to be raised in, and a signal that comes just before
    a blocking call does not wake it.  So each signal leaves a byte in a pipe too, which :meth:`wait` and :meth:`check`
    look at.
    """

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {signum: signal.signal(signum, self._interrupt) for signum in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._reader)
        os.close(self._writer)

    def wait(self) -> None:
        """Blocks until there has been a signal since entering, and raises KeyboardInterrupt."""
        select.select([self._reader], [], [])
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt when there has been a signal since entering."""
        if select.select([self._reader], [], [], 0)[0]:
            raise KeyboardInterrupt

    @staticmethod
    def _interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt


class CtrlC:
    """While entered, Ctrl-C raises KeyboardInterrupt only inside an :meth:`allowed` block: an impatient second one does
    not hit the clean-up after the first."""

    def __init__(self) -> None:
        self._armed = False
        self._act: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    @contextmanager
    def calling(self, act: Callable[[], None]) -> Iterator[None]:
        """Meanwhile Ctrl-C raises nothing, and the first one calls ``act`` on a thread of its own: an exception from
        nowhere may leave gRPC's locks taken, and a later call would wait for ever."""
        self._act = act
        try:
            yield
        finally:
            self._act = None

    @contextmanager
    def allowed(self) -> Iterator[None]:
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if (act := self._act) is not None:
            self._act = None
            Thread(target=act, name="interrupt", daemon=True).start()
        elif self._armed:
            raise KeyboardInterrupt
