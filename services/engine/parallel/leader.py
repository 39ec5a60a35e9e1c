"""The first rank's runner: tells the others of each step, computes its own share, and draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.engine.batch import Batch
from services.engine.parallel.frames import pack_step
from services.engine.runners import ShardRunner
from services.engine.steps import Outcome, Step


class LeadingRunner:
    """When it has computed a step, the others have stored all KV of it and read all they need: its last sum is over what
    they computed after that."""

    runs_ahead = False

    def __init__(
        self, own: ShardRunner, tell: Callable[[bytes], None], broken: Callable[[Exception], Exception]
    ) -> None:
        """``tell`` sends a step to every other rank.  After any failure of a step the ranks may not agree where they are:
        ``broken`` is told of it and says what to raise."""
        assert not own.runs_ahead
        self._own, self._tell, self._broken = own, tell, broken

    def start(self, batch: Batch) -> Step:
        return _LedStep(batch, self._own.start(batch), self._tell, self._broken)

    def warm_up(self) -> None:
        """While the other ranks do the same, before the first step."""
        self._own.warm_up()


@dataclass(slots=True)
class _LedStep:
    batch: Batch
    own: Step
    tell: Callable[[bytes], None]
    broken: Callable[[Exception], Exception]

    def wait_nearly(self) -> None: ...

    def result(self) -> Outcome:
        try:
            self.tell(pack_step(self.batch))
            return self.own.result()
        except Exception as e:
            raise self.broken(e) from e
