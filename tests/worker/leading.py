"""``python -m tests.worker.leading MODEL DTYPE [gpu]``: rank 0 of two, on the CPU or on GPUs 0 and 1, in a process of its
own, since torch.distributed has one group in each.  Draws tokens and says so; then ``kill`` on its input has it end the
other rank; with anything else it waits."""

from __future__ import annotations

import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import transport
from services.engine.batch import Batch, Entry, build_batch
from services.engine.layout import KvLayout
from services.engine.model_files import ModelFiles, open_model
from services.engine.parallel.frames import Setup
from services.engine.parallel.leader import LeadingRunner
from services.engine.parallel.shard import Shard
from services.engine.runners import create_shard_runner
from services.engine.sampling_params import Sampling
from services.engine.steps import Draws
from services.engine.weights import load_weights
from services.worker.ranks import RankLostError, Ranks
from tests.engine.paging import decode_together
from transport import Region

NUM_BLOCKS, BLOCK_SIZE, SIZE = 32, 16, 2
SAMPLINGS = [Sampling(), Sampling(temperature=0.9, top_p=0.95, seed=11)]
PROMPTS = ("The capital of France is Paris. The capital of Italy is", "Once upon a time", "1, 2, 3, 5, 8, 13,")
NUM_TOKENS = 16


def layout(files: ModelFiles, dtype: str, tp: int) -> KvLayout:
    model = files.config
    return KvLayout(model.revision, dtype, BLOCK_SIZE, model.num_layers, model.num_kv_heads, model.head_dim, tp)


def setup(files: ModelFiles, dtype: str, region: Region) -> Setup:
    return Setup(
        rank=1, size=SIZE, model=str(files.path), revision=files.config.revision, dtype=dtype,
        block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, max_running=8, threads=1, cpus=(), device=region.device,
        compiled=True, pool=region.lend().hex(), store="", log_name="test/1", log_level="warning", returns_early=False,
    )  # fmt: skip


def tokens(files: ModelFiles, run: Callable[[Batch], Draws], sampling: Sampling) -> list[list[int]]:
    prompts = [files.tokenizer.encode(text, add_special=True) for text in PROMPTS]
    return decode_together(run, prompts, sampling, NUM_TOKENS, BLOCK_SIZE)


@contextmanager
def leading(files: ModelFiles, dtype: str, *, gpu: bool, on_lost: Callable[[RankLostError], None]
            ) -> Iterator[tuple[Ranks, LeadingRunner]]:  # fmt: skip
    whole = layout(files, dtype, SIZE)
    with ExitStack() as stack:
        owner = stack.enter_context(transport.create("ucx"))
        regions = [
            owner.allocate(NUM_BLOCKS * whole.of_rank(rank).block_nbytes, rank if gpu else None) for rank in range(SIZE)
        ]
        ranks = stack.enter_context(Ranks([setup(files, dtype, regions[1])], on_lost))
        shard = Shard.of(files.config, 0, SIZE)
        weights = load_weights(files.config, files.path, dtype, shard=shard)
        ranks.join()
        own = create_shard_runner(
            files.config, weights, whole, regions[0], NUM_BLOCKS, shard, str(ranks.store),
            compiled=True, num_threads=1, max_running=8, returns_early=False,
        )  # fmt: skip
        runner = LeadingRunner(own, ranks.tell, ranks.broken)
        runner.warm_up()
        ranks.wait_ready()
        yield ranks, runner


def main() -> None:
    files = open_model(sys.argv[1])
    lost: queue.Queue[RankLostError] = queue.Queue()
    with leading(files, sys.argv[2], gpu="gpu" in sys.argv[3:], on_lost=lost.put) as (ranks, runner):
        say("pid", ranks.pids[0])
        say("folder", ranks.store.parent)
        for sampling in SAMPLINGS:
            say("tokens", tokens(files, lambda batch: runner.start(batch).result().draws, sampling))
        if sys.stdin.readline() == "kill\n":
            os.kill(ranks.pids[0], signal.SIGKILL)
            try:
                runner.start(build_batch([Entry([1], 0, [0], Sampling())], BLOCK_SIZE)).result()
            except RankLostError as e:
                say("step", e)
            say("lost", lost.get(timeout=30))
        else:
            sys.stdin.read()  # until it is killed


def say(what: str, value: object) -> None:
    sys.stdout.write(f"\n{what}: {value}\n")  # another thread's log may be within a line
    sys.stdout.flush()


if __name__ == "__main__":
    main()
