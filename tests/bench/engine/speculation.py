"""What drafts gain, and what they cost where there is nothing to guess: python -m tests.bench.engine.speculation

Answers of the default model by the compiled kernels, each batch once without drafts and once with them, in turns.  The
answers are compared: not a token may differ.  Needs CPUs that nobody else uses; ratios of one run count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

from services.engine.batch import build_batch
from services.engine.blocks import BlockPool
from services.engine.checkpoint import DEFAULT_MODEL
from services.engine.hashing import chain_root
from services.engine.lookup import Drafter
from services.engine.model_files import ModelFiles, open_model
from services.engine.sampling_params import Sampling
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import Sequence, SequenceId, TokenDrawn
from tests.bench.engine.engines import BLOCK_SIZE, Ours
from tests.bench.engine.texts import CODE, OPENINGS, PASSAGES

THREADS = len(os.sched_getaffinity(0))
MAX_TOKENS = 96
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0)


@dataclass(frozen=True, slots=True)
class Work:
    """Eight prompts of one kind, and how they are answered."""

    name: str
    prompts: list[list[int]]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Run:
    """``seconds``: of the steps that only decode."""

    answers: dict[str, list[int]]
    tokens: int
    seconds: float
    drafted: int
    accepted: int


def works(files: ModelFiles) -> Iterator[Work]:
    def asked(text: str) -> list[int]:
        rendered = files.chat_template.render([{"role": "user", "content": text}])
        return files.tokenizer.encode(rendered, add_special=False)

    def continued(text: str) -> list[int]:
        return files.tokenizer.encode(text, add_special=True)

    edits = [f"{code}\n# The same once more, with a docstring for each function:\n{code[:60]}" for code in CODE]
    yield Work("code to edit, greedy", [continued(text) for text in edits], GREEDY)
    quotes = [f"Repeat this text word by word:\n\n{passage}" for passage in PASSAGES]
    yield Work("quotation, greedy", [asked(text) for text in quotes], GREEDY)
    yield Work("quotation, sampled", [asked(text) for text in quotes], SAMPLED)
    yield Work("prose, greedy", [asked(text) for text in OPENINGS], GREEDY)
    yield Work("prose, sampled", [continued(text) for text in OPENINGS], SAMPLED)


def run(ours: Ours, files: ModelFiles, work: Work, batch: int, *, drafts: bool) -> Run:
    """``batch`` prompts at once; alone, two of them one after the other."""
    limits = Limits(block_size=BLOCK_SIZE, context_length=files.config.context_length, max_running=batch)
    scheduler = Scheduler(BlockPool(ours.num_blocks), limits)
    stop_ids = frozenset(files.config.eos_token_ids)
    prompts = work.prompts[: max(batch, 2)]
    for number, prompt in enumerate(prompts):
        sampling = Sampling(temperature=work.sampling.temperature, seed=number)
        drafter = Drafter() if drafts else None
        name, root = SequenceId(str(number)), chain_root(files.config.revision)
        scheduler.add(Sequence(name, list(prompt), sampling, MAX_TOKENS, stop_ids, [root], drafter=drafter))
    answers: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    tokens = drafted = accepted = 0
    seconds = 0.0
    while True:
        began = time.perf_counter()
        plan = scheduler.plan()
        if plan is None:
            return Run(answers, tokens, seconds, drafted, accepted)
        decodes = plan.num_prefill_tokens == 0
        events = scheduler.complete(plan, ours.runner.run(build_batch(plan.entries, BLOCK_SIZE)))
        elapsed = time.perf_counter() - began
        drawn = [event for event in events if isinstance(event, TokenDrawn)]
        for event in drawn:
            answers[event.id].append(event.drawn.token_id)
        if decodes:
            seconds += elapsed
            tokens += len(drawn)
            drafted += plan.num_draft_tokens
            accepted += len(drawn) - len({event.id for event in drawn})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "int8"])
    arguments = parser.parse_args()
    files = open_model(DEFAULT_MODEL)
    print(f"{THREADS} threads, medians of {arguments.rounds} rounds; drafts as shares of the tokens decoded")
    print(f"{'dtype':9} {'answers':20} batch  off, tokens/s  on, tokens/s  on / off            drafted accepted")
    for dtype in arguments.dtype:
        ours = Ours(files, dtype, THREADS)
        for work in works(files):
            for batch in (1, 8):
                off, on, ratios = [], [], []
                for _ in range(arguments.rounds):
                    plain = run(ours, files, work, batch, drafts=False)
                    drafting = run(ours, files, work, batch, drafts=True)
                    assert drafting.answers == plain.answers, f"{dtype}, {work.name}: drafts changed an answer"
                    off.append(plain.tokens / plain.seconds)
                    on.append(drafting.tokens / drafting.seconds)
                    ratios.append(on[-1] / off[-1])
                print(
                    f"{dtype:9} {work.name:20} {batch:5} {statistics.median(off):14.1f} {statistics.median(on):13.1f}  "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})  "
                    f"{drafting.drafted / drafting.tokens:7.0%} {drafting.accepted / drafting.tokens:8.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
