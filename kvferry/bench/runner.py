"""Sends what a schedule says and records what comes back."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from kvferry import errors
from kvferry.bench.doors import Door
from kvferry.bench.record import Record
from kvferry.bench.workload import Ask, Prompt

LOOK_EVERY_S = 0.05
INTERRUPTED = "INTERRUPTED"
# How long a place of a closed loop rests after a failure: without, refusals would be asked for as fast as they are given.
MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 5.0
_YOUNG, _NEVER = 150, 2**31 - 1

Schedule = Iterable[tuple[float, Ask, Callable[[], Prompt]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """``cores`` is this process's own CPU time by the clock's, ``loop_lag_s`` the most that its event loop was late."""

    records: tuple[Record, ...]
    cores: float
    loop_lag_s: float
    interrupted: bool


@contextmanager
def _no_long_looks() -> Iterator[None]:
    """Python's looks for cycles among all that has lived long stop a load of 2200 streams for up to half a second, time and
    again, and those among what a hundred new streams made for 0.1 s.  So what is young is looked through often, a few
    streams' worth at a time, and the rest when the load has ended: calls that have ended are held in no cycle.  From
    Python 3.14 on thresholds mean something else, and stay as they are."""
    if sys.version_info >= (3, 14):
        yield
        return
    gc.freeze()
    kept = gc.get_threshold()
    gc.set_threshold(_YOUNG, 1, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*kept)
        gc.unfreeze()


class Runner:
    """One load.  At most ``max_open`` streams at once; a send that must wait for one to end is late, and its latency
    counts from when it was due.  In a closed loop (``closed``) a request is due when another has ended, and some time later
    where that one failed."""

    def __init__(
        self, door: Door, *, max_open: int, closed: bool, timeout_s: float,
        on_end: Callable[[Record], None] = lambda record: None,
    ) -> None:  # fmt: skip
        self._door = door
        self._places = asyncio.Semaphore(max_open)
        self._closed = closed
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._records: list[Record] = []
        self._began_s = 0.0
        self._loop_lag_s = 0.0
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Sends nothing more and cancels what is under way; ``run`` returns what there is.  Idempotent."""
        self._stopped.set()

    async def run(self, schedule: Schedule) -> Outcome:
        """``schedule``: when, what, and how to make its prompt, in order of time."""
        with _no_long_looks():
            return await self._run(schedule)

    async def _run(self, schedule: Schedule) -> Outcome:
        self._began_s, cpu_s = time.monotonic(), time.process_time()
        sending = asyncio.create_task(self._send(schedule))
        stopping = asyncio.create_task(self._stopped.wait())
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait((sending, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, stopping, watching):
                if not task.done():
                    task.cancel()
            ended = await asyncio.gather(sending, stopping, watching, return_exceptions=True)
        if isinstance(ended[0], Exception):
            raise ended[0]
        seconds = self._now_s()
        return Outcome(
            tuple(self._records), (time.process_time() - cpu_s) / seconds, self._loop_lag_s, self._stopped.is_set()
        )

    async def _send(self, schedule: Schedule) -> None:
        async with asyncio.TaskGroup() as streams:
            for at_s, ask, make_prompt in schedule:
                prompt = make_prompt()
                if (early_s := at_s - self._now_s()) > 0:
                    await asyncio.sleep(early_s)
                await self._places.acquire()
                due_s = self._now_s() if self._closed else at_s
                streams.create_task(self._follow(due_s, ask, prompt))
                await asyncio.sleep(0)  # lets it go before the next prompt is made

    async def _follow(self, due_s: float, ask: Ask, prompt: Prompt) -> None:
        sent_s = self._now_s()
        token_at_s: list[float] = []
        error: str | None = INTERRUPTED
        said, refused = "", False
        pause_s = 0.0
        try:
            async with aclosing(self._door.stream(prompt, ask.num_output_tokens, self._timeout_s)) as answer:
                async for num_tokens in answer:
                    token_at_s += [self._now_s()] * num_tokens
            error = None
        except errors.Error as failure:
            error, said, refused = failure.reason, failure.message, isinstance(failure, errors.OverloadedError)
            pause_s = min(max(failure.retry_after_s or 0.0, MIN_PAUSE_S), MAX_PAUSE_S)
        finally:
            record = Record(
                due_s, sent_s, self._now_s(), ask.num_prompt_tokens, tuple(token_at_s), error, refused, ask.cut, said
            )
            self._records.append(record)
            self._on_end(record)
        if self._closed and pause_s > 0:
            await asyncio.sleep(pause_s)
        self._places.release()

    async def _watch(self) -> None:
        while True:
            due_s = self._now_s() + LOOK_EVERY_S
            await asyncio.sleep(LOOK_EVERY_S)
            self._loop_lag_s = max(self._loop_lag_s, self._now_s() - due_s)

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s
