"""The cost model of this machine: measured steps of the real engine, and a line through them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from random import Random

import numpy as np

from services.engine.batch import Entry
from services.engine.checkpoint import DEFAULT_MODEL
from services.engine.model_files import open_model
from services.planner.simulator.cost_model import CostModel, shares
from tests.bench.engine.engines import BLOCK_SIZE, GREEDY, Ours

# Of the transfer, which is not measured here: ADR 16's measured pull, and a call over loopback.
TRANSFER_BYTES_PER_S = 3.1e9
ROUND_TRIP_S = 0.001
PLACES = [*((n, start) for n in (32, 128, 256) for start in (0, 768))]
BATCHES = [(batch, context) for batch in (1, 4, 12) for context in (128, 1024)]


def measure(rounds: int) -> tuple[CostModel, int, float]:
    """The model, the bytes of a block, and the median error of a step's time, as a share.  One thread; the medians."""
    engine = Ours(open_model(DEFAULT_MODEL), "int8", 1)
    rows, seconds = [], []
    for entries in _steps(engine.num_blocks):
        rows.append(shares((len(e.token_ids), e.start) for e in entries))
        engine.run(entries)
        taken = []
        for _ in range(rounds):
            began = time.perf_counter()
            engine.run(entries)
            taken.append(time.perf_counter() - began)
        seconds.append(statistics.median(taken))
    matrix, times = np.array(rows), np.array(seconds)
    found = _non_negative(matrix / times[:, None], np.ones_like(times))
    error = float(np.median(np.abs(matrix @ found / times - 1)))
    a, b, c, d, e = found.tolist()
    return CostModel(a, b, c, d, e, ROUND_TRIP_S, TRANSFER_BYTES_PER_S), engine.layout.block_nbytes, error


def _non_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares; what comes out below 0 is left out, and the rest fitted again."""
    kept = list(range(matrix.shape[1]))
    while True:
        part = np.linalg.lstsq(matrix[:, kept], wanted, rcond=None)[0]
        if (part >= 0).all():
            found = np.zeros(matrix.shape[1])
            found[kept] = part
            return found
        del kept[int(part.argmin())]


def _steps(num_blocks: int) -> Iterator[list[Entry]]:
    table, random = list(range(num_blocks)), Random(0)
    for count, start in PLACES:
        yield [Entry([random.randrange(1000, 40000) for _ in range(count)], start, table, GREEDY)]
    for batch, context in BATCHES:
        each = -(-(context + 1) // BLOCK_SIZE)
        yield [Entry([1000 + i], context, table[i * each : (i + 1) * each], GREEDY) for i in range(batch)]
