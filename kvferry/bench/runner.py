"""Sends what a schedule says and records what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from kvferry import errors
from kvferry.aio import AsyncClient
from kvferry.bench.record import Record
from kvferry.bench.workload import Ask

LOOK_EVERY_S = 0.05
INTERRUPTED = "INTERRUPTED"


class Door(Protocol):
    """A way into the system."""

    def stream(self, prompt: list[int], num_output_tokens: int, timeout_s: float) -> AsyncGenerator[int, None]:
        """How many tokens came, each time some did; ends with the answer.  Raises kvferry.Error."""
        ...


class GrpcDoor:
    """Owns nothing: ``client`` is the caller's.  It should not try again by itself, or refusals are not seen."""

    def __init__(self, client: AsyncClient, model: str = "") -> None:
        self._client = client
        self._model = model

    async def stream(self, prompt: list[int], num_output_tokens: int, timeout_s: float) -> AsyncGenerator[int, None]:
        asked = self._client.generate(
            prompt, model=self._model, max_tokens=num_output_tokens, ignore_eos=True, temperature=0, timeout=timeout_s
        )
        async with asked as answer:
            async for chunk in answer:
                if chunk.tokens:
                    yield len(chunk.tokens)


@dataclass(frozen=True, slots=True)
class Outcome:
    """``cores`` is this process's own CPU time by the clock's, ``loop_lag_s`` the most that its event loop was late."""

    records: tuple[Record, ...]
    cores: float
    loop_lag_s: float
    interrupted: bool


class Runner:
    """One load.  At most ``max_open`` streams at once; a send that must wait for one to end is late, and its latency
    counts from when it was due.  In a closed loop (``closed``) a request is due when another has ended."""

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

    async def run(self, schedule: Iterable[tuple[float, Ask, Callable[[], list[int]]]]) -> Outcome:
        """``schedule``: when, what, and how to make its prompt, in order of time."""
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

    async def _send(self, schedule: Iterable[tuple[float, Ask, Callable[[], list[int]]]]) -> None:
        async with asyncio.TaskGroup() as streams:
            for at_s, ask, make_prompt in schedule:
                prompt = make_prompt()
                if (early_s := at_s - self._now_s()) > 0:
                    await asyncio.sleep(early_s)
                await self._places.acquire()
                due_s = self._now_s() if self._closed else at_s
                streams.create_task(self._follow(due_s, ask, prompt))
                await asyncio.sleep(0)  # lets it go before the next prompt is made

    async def _follow(self, due_s: float, ask: Ask, prompt: list[int]) -> None:
        sent_s = self._now_s()
        token_at_s: list[float] = []
        error: str | None = INTERRUPTED
        refused = False
        try:
            async with aclosing(self._door.stream(prompt, ask.num_output_tokens, self._timeout_s)) as answer:
                async for num_tokens in answer:
                    token_at_s += [self._now_s()] * num_tokens
            error = None
        except errors.Error as failure:
            error, refused = failure.reason, isinstance(failure, errors.OverloadedError)
        finally:
            self._places.release()
            record = Record(due_s, sent_s, self._now_s(), len(prompt), tuple(token_at_s), error, refused)
            self._records.append(record)
            self._on_end(record)

    async def _watch(self) -> None:
        while True:
            due_s = self._now_s() + LOOK_EVERY_S
            await asyncio.sleep(LOOK_EVERY_S)
            self._loop_lag_s = max(self._loop_lag_s, self._now_s() - due_s)

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s
