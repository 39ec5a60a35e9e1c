"""The seam between the engine and what computes: a step is handed over, and its outcome is fetched."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from services.engine.batch import Batch
from services.engine.ready import Ready
from services.engine.sampling_params import DrawFailed, Drawn

Draws = list[Drawn | DrawFailed | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One draw for each of ``batch.samples``, in order; None or anything behind a draft that is not what was drawn.  When
    the computing began and when the numbers were there, by time.monotonic().  ``ready``: when the KV is in the pool, None
    where it is; a step that leaves some to come has waited for the one before."""

    draws: Draws
    began_s: float
    ended_s: float
    ready: Ready | None = None


class Step(Protocol):
    """A step that was handed over.  ``result`` is called once, whatever happens."""

    def wait_nearly(self) -> None:
        """Blocks until the step is about to end: the time to plan the next one."""

    def result(self) -> Outcome:
        """Blocks until the step has ended.  Raises what it failed with."""


class Runner(Protocol):
    @property
    def runs_ahead(self) -> bool:
        """Whether it takes a step before the one before has ended, with tokens that this is still to draw
        (``Batch.token_ids``).  Otherwise it computes on the thread that asks for the result."""

    def start(self, batch: Batch) -> Step:
        """Does not block.  One thread calls it, for one step at a time, or with ``runs_ahead`` two."""


class Blocking:
    """A step that is computed by whoever asks for its result."""

    def __init__(self, compute: Callable[[], Draws], ready: Callable[[], Ready | None] = lambda: None) -> None:
        """``ready`` is asked after it: see ``Outcome``."""
        self._compute, self._ready = compute, ready

    def wait_nearly(self) -> None: ...

    def result(self) -> Outcome:
        began_s = time.monotonic()
        draws = self._compute()
        return Outcome(draws, began_s, time.monotonic(), self._ready())
