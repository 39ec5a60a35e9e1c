"""What the accounts of a step cost: phases, counted work, and the sums that prices are fitted to."""

from __future__ import annotations

import time

from services.engine.model_config import ModelConfig
from services.engine.phase_book import PhaseBook
from services.engine.phases import Ceilings, ModelShape, Piece
from services.engine.step_sums import StepSums
from services.engine.step_times import StepTimes
from tests.bench.engine.engines import Ours
from tests.bench.engine.rows import Row, compared, in_turn

BATCHES, CONTEXT = (1, 16), 512
NUM_STEPS = 500
SHARE = 0.01  # of a step that they may take


class Accounts:
    """What an engine writes down of a step that decodes: its phase, its work, and how long such steps take."""

    def __init__(self, config: ModelConfig) -> None:
        self._book = PhaseBook(ModelShape.of(config, (1.0, 1.0), "bfloat16"), Ceilings(1e12, 4e10))
        self._sums, self._times, self._now_s = StepSums(), StepTimes(), 0.0

    def observe(self, batch: int, elapsed_s: float) -> None:
        pieces: tuple[list[Piece], list[Piece]] = [], [Piece(1, CONTEXT, 1) for _ in range(batch)]
        ended_s = self._now_s + elapsed_s
        self._book.compute(self._now_s)
        self._book.step(*pieces, self._now_s, ended_s)
        expected_s = self._times.expected_s(batch)
        self._sums.observe(*pieces, elapsed_s, expected_s)
        if expected_s:
            self._sums.observe_decode(elapsed_s, expected_s)
        self._times.observe(batch, elapsed_s)
        self._now_s = ended_s


def measure(ours: Ours, config: ModelConfig, rounds: int, on: str) -> list[Row]:
    rows = []
    for batch in BATCHES:
        accounts = Accounts(config)

        def account(batch: int = batch, accounts: Accounts = accounts) -> float:
            began = time.perf_counter()
            for _ in range(NUM_STEPS):
                accounts.observe(batch, 0.003)
            return (time.perf_counter() - began) / NUM_STEPS

        taken = in_turn(
            {"accounts": account, "step": lambda batch=batch: SHARE * ours.decode(batch, CONTEXT)},  # type: ignore[misc]
            rounds,
        )
        work = f"accounts of a step {on}, batch {batch}, against {SHARE:.0%} of the step"
        rows.append(compared(work, taken["accounts"], taken["step"], 1.0))
    return rows
