"""A runner with a pool, block tables in shuffled order, and greedy decoding over any schedule of chunks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
import numpy.typing as npt

from services.engine.batch import Batch, Entry, build_batch
from services.engine.kernels.model import why_not
from services.engine.kernels.packing import pack
from services.engine.kernels.runner import CompiledRunner
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.runner import TorchRunner
from services.engine.runners import kv_dtype
from services.engine.sampling_params import Drawn, Sampling
from services.engine.steps import Draws
from services.engine.weights import Weights

GREEDY = Sampling()
_AS_GOOD = 0.5  # of a logit: for SmolLM2 in bfloat16 0.2 was the most, and its second best is mostly 1 or more behind


class PagedModel:
    """Every slot of the pool is NaN at first: what attention should not read would show."""

    def __init__(self, config: ModelConfig, weights: Weights, *, num_blocks: int, block_size: int = 16,
                 dtype: str = "float32", seed: int = 0, kernels: bool | str = True) -> None:  # fmt: skip
        """``kernels``: the compiled ones where they know the model (a name: that instruction set), or else torch."""
        self.block_size = block_size
        self.layout = KvLayout(
            config.revision, kv_dtype(dtype), block_size, config.num_layers, config.num_kv_heads, config.head_dim
        )
        self.arena = bytearray(b"\xff" * (num_blocks * self.layout.block_nbytes))
        pool = (self.layout, memoryview(self.arena), num_blocks, 1)
        self.runner: TorchRunner | CompiledRunner
        if kernels and why_not(config) is None:
            named = kernels if isinstance(kernels, str) else None
            self.runner = CompiledRunner(config, pack(config, weights, dtype), *pool, instruction_set=named)
        else:
            self.runner = TorchRunner(config, weights, *pool)
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)

    def table(self, num_tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-num_tokens // self.block_size))]

    def logits(self, entries: Sequence[Entry]) -> npt.NDArray[np.float32]:
        return self.runner.logits(build_batch(entries, self.block_size))

    def prompt_logits(self, ids: Sequence[int], chunk: int | None = None) -> npt.NDArray[np.float32]:
        """Of the last token, the prompt being computed in chunks."""
        table, chunk = self.table(len(ids)), chunk or len(ids)
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            last = start + len(part) == len(ids)
            found = self.logits([Entry(part, start, table, GREEDY if last else None)])
            assert len(found) == int(last)
        return found[0]

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int, chunk: int) -> list[list[int]]:
        """All at once, one sequence joining per step: chunks of some share steps with others' single tokens."""
        tables = [self.table(len(ids) + num_tokens) for ids in prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        computed = [0] * len(prompts)
        for step in range(10_000):
            entries, who = [], []
            for i, ids in enumerate(prompts[: step + 1]):
                if len(outputs[i]) == num_tokens:
                    continue
                known = [*ids, *outputs[i]]
                part = known[computed[i] : computed[i] + chunk]
                complete = computed[i] + len(part) == len(known)
                entries.append(Entry(part, computed[i], tables[i], GREEDY if complete else None))
                computed[i] += len(part)
                if complete:
                    who.append(i)
            if not entries:
                return outputs
            for i, drawn in zip(who, self.runner.run(build_batch(entries, self.block_size)), strict=True):
                outputs[i].append(drawn.token_id)
        raise AssertionError("never finished")


def decode_together(run: Callable[[Batch], Draws], prompts: Sequence[Sequence[int]], sampling: Sampling, num_tokens: int,
                    block_size: int) -> list[list[int]]:  # fmt: skip
    """The first step computes the prompts, each further one a token of each, in the pool's first blocks, in order."""
    texts, computed = [list(prompt) for prompt in prompts], [0] * len(prompts)
    free = count()
    tables = [[next(free) for _ in range(0, len(text) + num_tokens, block_size)] for text in texts]
    for _ in range(num_tokens):
        entries = [
            Entry(text[done:], done, table, sampling) for text, done, table in zip(texts, computed, tables, strict=True)
        ]
        computed = [len(text) for text in texts]
        for text, drawn in zip(texts, run(build_batch(entries, block_size)), strict=True):
            assert isinstance(drawn, Drawn)
            text.append(drawn.token_id)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def assert_likely(reference: PagedModel, prompt: Sequence[int], drawn: Sequence[int]) -> None:
    """The reference finds each token as good as the best one there: greedy tokens of rounded numbers differ where several
    are as good as equal."""
    tokens = [*prompt, *drawn[:-1]]
    found = reference.logits([Entry(tokens, 0, reference.table(len(tokens)), GREEDY, num_drafts=len(drawn) - 1)])
    for place, (token, logits) in enumerate(zip(drawn, found, strict=True)):
        assert logits.max() - logits[token] < _AS_GOOD, f"token {place} of {list(drawn)}"


def relative_error(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
