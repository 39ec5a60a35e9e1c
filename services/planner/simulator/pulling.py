"""Cached blocks that a simulated worker reads from another before it computes a prompt.  Pure.

The books of pulls and pins are the workers' own; what a pull takes is simulated: two calls to the holder, and the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.planner.simulator.cost_model import CostModel
from services.planner.simulator.events import EventQueue
from services.planner.simulator.worker import SimulatedWorker
from services.worker.pins import ReaderId, TooManyPinsError
from services.worker.pulls import Pull, TooManyPullsError

# Nothing hangs here, so no pin ends before its reader gives it back.
PIN_S = 1e9

Then = Callable[[], None]


class Pulling:
    def __init__(self, queue: EventQueue, costs: CostModel, on_changed: Callable[[SimulatedWorker], None]) -> None:
        """``on_changed``: of a worker whose load is another than it was."""
        self._queue = queue
        self._costs = costs
        self._on_changed = on_changed
        self._waiting: dict[Pull, list[Then]] = {}
        self._num_pins = 0

    def pull(self, puller: SimulatedWorker, holder: SimulatedWorker, chain: Sequence[bytes], then: Then) -> None:
        """``then`` is called when what the holder has of the chain is cached at the puller, or nothing more is to be waited
        for: at once where nothing can be pulled.  Who asks for blocks that are on their way waits for their pull."""
        if (found := puller.pulls.find(chain)) is not None:
            self._waiting[found].append(then)
            return
        try:
            pull = puller.pulls.begin(chain)
        except TooManyPullsError:
            pull = None
        if pull is None or not self._begin(pull, puller, holder, then):
            then()

    def _begin(self, pull: Pull, puller: SimulatedWorker, holder: SimulatedWorker, then: Then) -> bool:
        """False: there is nothing to read, or no room for it."""
        reader, now_s = ReaderId(puller.spec.worker_id, puller.key.incarnation), self._queue.now_s
        self._num_pins += 1
        pin_id = f"pin{self._num_pins}"
        try:
            pin = holder.pins.pin(pin_id, pull.lacking, reader, now_s=now_s, lifetime_s=PIN_S)
        except TooManyPinsError:
            pin = None
        count = min(len(pin.blocks), len(pull.lacking), puller.scheduler.num_spare_blocks) if pin else 0
        if not count:
            if pin is not None:
                holder.pins.release(pin_id, reader, now_s=now_s)
            puller.pulls.stop(pull)
            return False
        puller.pulls.lend(pull, count)
        puller.wake()  # what made room is told
        self._waiting[pull] = [then]

        def read() -> None:
            puller.pulls.read_ended(pull)
            holder.pins.release(pin_id, reader, now_s=self._queue.now_s)
            puller.pulls.conclude(pull)
            puller.pulled()
            for worker in (puller, holder):
                self._on_changed(worker)
            holder.wake()
            for waiting in self._waiting.pop(pull):
                waiting()
            puller.wake()

        self._queue.after(self._costs.transfer_s(count * puller.spec.block_nbytes), read)
        return True
