"""A prompt that the pool has evicted, from the host's memory: through the engine, its scheduler and its threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from services.engine.blocks import BlockPool, CacheChange
from services.engine.copies import CopyThread
from services.engine.engine import Engine, StepTime
from services.engine.hashing import chain_root, extend_chain
from services.engine.host_copier import HostCopier
from services.engine.host_tier import HostTier
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import Event, Sequence, SequenceId, StepFailed, TokenDrawn
from tests.bench.engine.engines import BLOCK_SIZE, CHUNK, GREEDY, Ours
from tests.bench.engine.rows import Row, compared, in_turn

PROMPT_TOKENS = 2048
PROMPT_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE
POOL_BLOCKS = PROMPT_BLOCKS + 32  # the next prompt evicts the one before
HOST_BLOCKS = 6 * PROMPT_BLOCKS
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Place:
    """Memory by its address."""

    address: int
    nbytes: int


class FirstToken:
    """Listens to an engine that answers one prompt at a time."""

    def __init__(self) -> None:
        self._drawn = threading.Semaphore(0)
        self._failed: StepFailed | None = None

    def wait(self) -> None:
        if not self._drawn.acquire(timeout=TIMEOUT_S) or self._failed:
            raise RuntimeError(f"no token: {self._failed}")

    def on_started(self, events: list[Event]) -> None: ...

    def on_events(self, events: list[Event], step: StepTime) -> None:
        for event in events:
            if isinstance(event, StepFailed):
                self._failed = event
            if isinstance(event, StepFailed | TokenDrawn):
                self._drawn.release()

    def on_cache_changes(self, changes: list[CacheChange]) -> None: ...

    def on_copied(self) -> None: ...

    def on_death(self, error: BaseException) -> None:
        self._failed = StepFailed(SequenceId("-"), str(error))
        self._drawn.release()


class Prompts:
    """Asked of an engine whose pool holds one of them."""

    def __init__(self, engine: Engine, first: FirstToken, revision: str) -> None:
        self._engine, self._first = engine, first
        self._root = chain_root(revision)
        self._rng = np.random.default_rng(7)
        self._asked: list[list[int]] = []

    def miss(self) -> float:
        """Seconds to the first token of a prompt that nobody has seen.  It evicts the one before."""
        self._asked.append(self._rng.integers(10, 20_000, PROMPT_TOKENS).tolist())
        return self._ask(self._asked[-1], 0)

    def hit_on_host(self) -> float:
        """Of the prompt before the last one: the pool has evicted it."""
        return self._ask(self._asked[-2], PROMPT_TOKENS - BLOCK_SIZE, from_host=True)

    def hit_in_pool(self) -> float:
        """Of the prompt that was asked last."""
        return self._ask(self._asked[-2], PROMPT_TOKENS - BLOCK_SIZE)

    def _ask(self, prompt: list[int], num_cached: int, *, from_host: bool = False) -> float:
        sequence = Sequence(SequenceId("p"), list(prompt), GREEDY, 1, frozenset(), [self._root])
        loaded = self._engine.host_totals.loaded
        began = time.perf_counter()
        with self._engine.exclusive() as scheduler:
            scheduler.add(sequence)
        self._first.wait()
        taken_s = time.perf_counter() - began
        self._settle(prompt)
        if sequence.num_cached != num_cached or (self._engine.host_totals.loaded > loaded) != from_host:
            raise RuntimeError(f"{sequence.num_cached} tokens were cached, not {num_cached}, or elsewhere")
        return taken_s

    def _settle(self, prompt: list[int]) -> None:
        """Until all of the prompt is saved, where anything is."""
        hashes = extend_chain(self._root, prompt, BLOCK_SIZE)
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            with self._engine.exclusive(wake=False) as scheduler:
                if not scheduler.host.num_slots or all(map(scheduler.host.holds, hashes)):
                    return
            time.sleep(0.002)
        raise RuntimeError("the prompt was not saved")


@contextmanager
def prompts(ours: Ours, revision: str, num_slots: int) -> Iterator[Prompts]:
    pool, first = BlockPool(POOL_BLOCKS), FirstToken()
    limits = Limits(BLOCK_SIZE, context_length=4096, max_step_tokens=CHUNK)
    nbytes = ours.layout.block_nbytes
    place = Place(np.frombuffer(ours.arena, np.uint8).ctypes.data, POOL_BLOCKS * nbytes)
    with CopyThread(HostCopier(place, nbytes, max(1, num_slots)), nbytes) as copies:
        engine = Engine(Scheduler(pool, limits, HostTier(pool, num_slots)), ours.runner, first, copies=copies)
        engine.start()
        try:
            yield Prompts(engine, first, revision)
        finally:
            engine.close()


def measure(ours: Ours, revision: str, rounds: int, on: str) -> list[Row]:
    """``on``: the format and the threads, in words."""
    with prompts(ours, revision, HOST_BLOCKS) as asked:
        asked.miss()
        calls = {"miss": asked.miss, "host": asked.hit_on_host, "pool": asked.hit_in_pool}
        taken = in_turn(calls, rounds)
    with prompts(ours, revision, 0) as without, prompts(ours, revision, HOST_BLOCKS) as saving:
        beside = in_turn({"off": without.miss, "on": saving.miss}, rounds)
    work = f"prefill {on}, {PROMPT_TOKENS} tokens"
    return [
        compared(f"{work}, a hit on the host against a miss", taken["host"], taken["miss"], 10.0),
        compared(f"{work}, a hit on the host against one in the pool", taken["host"], taken["pool"]),
        compared(
            f"{work}, a miss while the one before is saved, against no host tier", beside["on"], beside["off"], 0.95
        ),
    ]
