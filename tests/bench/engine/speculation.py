"""What drafts gain, and what they cost where there is nothing to guess: python -m tests.bench.engine.speculation

Answers of the default model by the compiled kernels, each batch without drafts and with them side by side, step by step in
turns.  The answers are compared: not a token may differ.  Ratios of one run count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

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


class Side:
    """``batch`` prompts at once, alone two of them one after the other, with or without drafts, a step at a time."""

    def __init__(self, ours: Ours, files: ModelFiles, work: Work, batch: int, *, drafts: bool) -> None:
        self._ours = ours
        num_blocks = ours.num_blocks // 2
        self._first_block = num_blocks if drafts else 0
        limits = Limits(block_size=BLOCK_SIZE, context_length=files.config.context_length, max_running=batch)
        self._scheduler = Scheduler(BlockPool(num_blocks), limits)
        stop_ids = frozenset(files.config.eos_token_ids)
        prompts = work.prompts[: max(batch, 2)]
        for number, prompt in enumerate(prompts):
            sampling = Sampling(temperature=work.sampling.temperature, seed=number)
            drafter = Drafter() if drafts else None
            name, root = SequenceId(str(number)), chain_root(files.config.revision)
            self._scheduler.add(Sequence(name, list(prompt), sampling, MAX_TOKENS, stop_ids, [root], drafter=drafter))
        self.answers: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        self.tokens = self.drafted = self.accepted = 0
        self.seconds = 0.0  # of the steps that only decode
        self.ended = False

    @property
    def progress(self) -> int:
        return sum(map(len, self.answers.values()))

    def step(self) -> None:
        began = time.perf_counter()
        plan = self._scheduler.plan()
        if plan is None:
            self.ended = True
            return
        planned = time.perf_counter()
        decodes = plan.num_prefill_tokens == 0
        entries = [replace(e, block_table=[b + self._first_block for b in e.block_table]) for e in plan.entries]
        shifted = time.perf_counter()
        events = self._scheduler.complete(plan, self._ours.run(entries).draws)
        elapsed = time.perf_counter() - shifted + planned - began
        drawn = [event for event in events if isinstance(event, TokenDrawn)]
        for event in drawn:
            self.answers[event.id].append(event.drawn.token_id)
        if decodes:
            self.seconds += elapsed
            self.tokens += len(drawn)
            self.drafted += plan.num_draft_tokens
            self.accepted += len(drawn) - len({event.id for event in drawn})


def compare(ours: Ours, files: ModelFiles, work: Work, batch: int) -> tuple[Side, Side]:
    """Whichever has fewer tokens takes the next step: what else the machine does befalls both."""
    off, on = (Side(ours, files, work, batch, drafts=drafts) for drafts in (False, True))
    while not (off.ended and on.ended):
        behind = min((side for side in (off, on) if not side.ended), key=lambda side: side.progress)
        behind.step()
    assert on.answers == off.answers, f"{work.name}: drafts changed an answer"
    return off, on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--answers", default="", help="only those whose name begins so")
    arguments = parser.parse_args()
    files = open_model(DEFAULT_MODEL)
    print(f"{THREADS} threads, medians of {arguments.rounds} rounds; drafts as shares of the tokens decoded")
    print(f"{'dtype':9} {'answers':20} batch  off, tokens/s  on, tokens/s  on / off            drafted accepted")
    for dtype in arguments.dtype:
        ours = Ours(files, dtype, THREADS)
        for work in works(files):
            if not work.name.startswith(arguments.answers):
                continue
            for batch in (1, 8):
                rounds = [compare(ours, files, work, batch) for _ in range(arguments.rounds)]
                rates = [(off.tokens / off.seconds, on.tokens / on.seconds) for off, on in rounds]
                ratios = [on / off for off, on in rates]
                on = rounds[0][1]
                print(
                    f"{dtype:9} {work.name:20} {batch:5} {statistics.median(r for r, _ in rates):14.1f} "
                    f"{statistics.median(r for _, r in rates):13.1f}  "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})  "
                    f"{on.drafted / on.tokens:7.0%} {on.accepted / on.tokens:8.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
