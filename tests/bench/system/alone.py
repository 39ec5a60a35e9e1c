"""The engine alone, in a process of its own: no gRPC, no event loop.  Reads one mix a line, answers with its seconds.

python -m tests.bench.system.alone DTYPE THREADS KV_NBYTES
"""

from __future__ import annotations

import json
import sys
import threading
import time

from services.engine.blocks import BlockPool, CacheChange
from services.engine.engine import Engine, StepTime
from services.engine.layout import KvLayout
from services.engine.model_files import open_model
from services.engine.runners import create_runner, kv_dtype, load_for_runner
from services.engine.sampling_params import Sampling
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import Event, Sequence, SequenceId, TokenDrawn
from services.worker.config import WorkerConfig
from tests.bench.engine.limits import large_pages
from tests.bench.system.mix import Ask


class Ends:
    """Counts the sequences that are still to end."""

    def __init__(self) -> None:
        self.num_left = 0
        self.num_tokens = 0
        self.all_over = threading.Event()

    def on_started(self, events: list[Event]) -> None: ...

    def on_events(self, events: list[Event], step: StepTime) -> None:
        drawn = [event for event in events if isinstance(event, TokenDrawn)]
        self.num_tokens += len(drawn)
        self.num_left -= sum(event.finish is not None for event in drawn)
        if self.num_left == 0:
            self.all_over.set()

    def on_cache_changes(self, changes: list[CacheChange]) -> None: ...

    def on_copied(self) -> None: ...

    def on_death(self, error: BaseException) -> None:
        self.all_over.set()


def make_engine(dtype: str, threads: int, kv_nbytes: int, ends: Ends) -> Engine:
    """As a worker makes it (services/worker/node.py), over memory that nobody else maps."""
    defaults = WorkerConfig(dtype=dtype, threads=threads)
    files = open_model(defaults.model)
    config = files.config
    layout = KvLayout(
        config.revision, kv_dtype(dtype), defaults.block_size, config.num_layers, config.num_kv_heads, config.head_dim
    )
    num_blocks = kv_nbytes // layout.block_nbytes
    arena = memoryview(large_pages(num_blocks * layout.block_nbytes))
    weights = load_for_runner(config, files.path, dtype, compiled=True)
    runner = create_runner(config, weights, layout, arena, num_blocks, threads)
    runner.warm_up()
    limits = Limits(
        block_size=defaults.block_size,
        context_length=config.context_length,
        max_step_tokens=defaults.num_step_tokens(on_gpu=False),
        max_running=defaults.max_running,
        max_waiting=defaults.max_waiting,
    )
    return Engine(Scheduler(BlockPool(num_blocks), limits), runner, ends)


def run(engine: Engine, ends: Ends, asks: list[Ask]) -> float:
    """Seconds from the first prompt to the last token."""
    ends.num_left, ends.num_tokens = len(asks), 0
    ends.all_over.clear()
    began = time.perf_counter()
    for number, ask in enumerate(asks):
        sampling = Sampling(temperature=ask.temperature, seed=ask.seed)
        id_ = SequenceId(f"{began}/{number}")
        with engine.exclusive() as scheduler:
            scheduler.add(Sequence(id_, [*ask.prompt], sampling, ask.num_answer, frozenset(), [b"root"]))
    ends.all_over.wait()
    return time.perf_counter() - began


def main() -> None:
    dtype, threads, kv_nbytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ends = Ends()
    engine = make_engine(dtype, threads, kv_nbytes, ends)
    engine.start()
    print("ready", flush=True)
    for line in sys.stdin:
        before = list(engine.gaps.counts)
        seconds = run(engine, ends, [Ask(**ask) for ask in json.loads(line)])
        gaps = [after - old for after, old in zip(engine.gaps.counts, before, strict=True)]
        print(json.dumps({"seconds": seconds, "tokens": ends.num_tokens, "gaps": gaps}), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
