"""The steps that are measured, and how long the engine takes for each.  With the engine."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from statistics import median
from typing import Any

from services.engine.batch import Entry, build_batch
from services.engine.layout import KvLayout
from services.engine.model_files import open_model
from services.engine.runners import WarmRunner, choose_dtype, create_runner, kv_dtype, load_for_runner
from services.engine.sampling_params import Sampling
from services.engine.step_sums import Shares
from services.planner.calibrate.fit import Fit, fit, spread_of_error
from services.planner.simulator.cost_model import CostModel, shares

BLOCK_SIZE = 16
MAX_BATCH, MAX_CONTEXT = 12, 1024
NUM_BLOCKS = MAX_BATCH * (MAX_CONTEXT // BLOCK_SIZE + 1)
# Of the transfer, which is not measured here: ADR 16's measured pull, and a call over loopback.
TRANSFER_BYTES_PER_S = 3.1e9
ROUND_TRIP_S = 0.001
PREFILLS = [(count, start) for count in (32, 128, 256) for start in (0, 768)]
DECODES = [(batch, context) for batch in (1, 4, MAX_BATCH) for context in (128, MAX_CONTEXT)]
# Both at once, as chunked prefill computes them; (number of prompt tokens, batch that decodes, its context).
MIXED = [(64, 4, 512), (224, MAX_BATCH, 512)]


@dataclass(frozen=True, slots=True)
class Calibration:
    costs: CostModel
    block_nbytes: int
    block_size: int
    model: str
    dtype: str
    num_threads: int
    fit: Fit
    num_steps: int

    def content(self) -> dict[str, Any]:
        """For JSON.  ``costs`` has the fields of CostModel."""
        return {
            "costs": asdict(self.costs), "block_nbytes": self.block_nbytes, "block_size": self.block_size,
            "model": self.model, "dtype": self.dtype, "threads": self.num_threads, "steps": self.num_steps,
            "median_error": self.fit.median_error, "max_error": self.fit.max_error,
        }  # fmt: skip


def calibrate(
    model: str, dtype: str, num_threads: int, rounds: int, tell: Callable[[int, int, str], None]
) -> Calibration:
    """Blocks.  ``tell``: done, of how many, and what comes now.  Each round takes every step once, so that a neighbour
    that is busy for a while disturbs no step more than another; the medians are fitted.  Raises ModelError."""
    tell(0, 1, "loading the model")
    files = open_model(model)
    config = files.config
    chosen = choose_dtype(config, dtype, compiled=True)
    layout = KvLayout(
        config.revision, kv_dtype(chosen), BLOCK_SIZE, config.num_layers, config.num_kv_heads, config.head_dim
    )
    weights = load_for_runner(config, files.path, chosen, compiled=True)
    with mmap.mmap(-1, NUM_BLOCKS * layout.block_nbytes) as pool, memoryview(pool) as view:
        runner = create_runner(config, weights, layout, view, NUM_BLOCKS, num_threads)
        runner.warm_up()
        steps = list(_steps(config.vocab_size))
        taken = _measure(runner, steps, rounds, tell)
        del runner
    found = fit([_shares(entries) for entries in steps], [median(each) for each in taken])
    costs = CostModel(*found.prices, ROUND_TRIP_S, TRANSFER_BYTES_PER_S, spread_of_error(found.rms_error))
    return Calibration(
        costs, layout.block_nbytes, BLOCK_SIZE, config.name, chosen, num_threads, found, len(steps)
    )  # fmt: skip


def _measure(
    runner: WarmRunner, steps: Sequence[list[Entry]], rounds: int, tell: Callable[[int, int, str], None]
) -> list[list[float]]:
    """Seconds, of each step; of a first round, which nobody counts, none."""
    taken: list[list[float]] = [[] for _ in steps]
    total = (rounds + 1) * len(steps)
    for round_number in range(rounds + 1):
        for number, entries in enumerate(steps):
            tell(round_number * len(steps) + number, total, f"round {round_number} of {rounds}")
            began_s = time.perf_counter()
            runner.start(build_batch(entries, BLOCK_SIZE)).result()
            if round_number > 0:
                taken[number].append(time.perf_counter() - began_s)
    tell(total, total, "measured")
    return taken


def _shares(entries: Sequence[Entry]) -> Shares:
    return shares((len(entry.token_ids), entry.start) for entry in entries)


def _steps(vocab_size: int) -> Iterator[list[Entry]]:
    drawn = Random(0)
    # Blocks that lie apart, as in a pool that has been used.
    table = drawn.sample(range(NUM_BLOCKS), NUM_BLOCKS)

    def prefill(count: int, start: int) -> Entry:
        return Entry([drawn.randrange(vocab_size // 2) for _ in range(count)], start, table, Sampling())

    def decode(batch: int, context: int) -> list[Entry]:
        each = context // BLOCK_SIZE + 1
        return [
            Entry([i + 5], context - 1, table[i * each : (i + 1) * each], Sampling()) for i in range(batch)
        ]  # fmt: skip

    for count, start in PREFILLS:
        yield [prefill(count, start)]
    for batch, context in DECODES:
        yield decode(batch, context)
    for count, batch, context in MIXED:
        rest = table[batch * (context // BLOCK_SIZE + 1) :]
        tokens = [drawn.randrange(vocab_size // 2) for _ in range(count)]
        yield [*decode(batch, context), Entry(tokens, 0, rest, Sampling())]
