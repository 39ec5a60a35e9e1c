"""Drafts with the real model and the compiled kernels: the same draws, to the last bit of their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from services.engine.batch import build_batch
from services.engine.blocks import BlockPool
from services.engine.hashing import chain_root
from services.engine.kernels.packing import pack
from services.engine.kernels.runner import CompiledRunner
from services.engine.layout import KvLayout
from services.engine.lookup import Drafter
from services.engine.model_files import ModelFiles
from services.engine.runners import kv_dtype
from services.engine.sampling_params import Drawn, Sampling
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import FinishReason, Sequence, SequenceId, TokenDrawn
from services.engine.weights import Weights
from tests.engine.test_scheduler_drafts import Oracle

BLOCK_SIZE, NUM_BLOCKS = 8, 22
TEXTS = (
    "one two three four. one two three four. one two three four. one two",
    "def add(a, b):\n    return a + b\n\ndef add(a, b):\n    return a +",
    "The capital of France is",
    "red blue red blue red blue red",
)
GREEDY = Sampling(num_logprobs=2)
SEEDED = Sampling(temperature=0.7, top_p=0.95, seed=11, num_logprobs=2)


@dataclass(frozen=True, slots=True)
class Asked:
    prompt: list[int]
    sampling: Sampling
    max_tokens: int = 24
    stop_ids: frozenset[int] = frozenset()


class Served:
    """The model in one format, over a pool that is too small for all at once."""

    def __init__(self, files: ModelFiles, weights: Weights, dtype: str) -> None:
        config = files.config
        self._root = chain_root(config.revision)
        layout = KvLayout(config.revision, kv_dtype(dtype), BLOCK_SIZE, config.num_layers, config.num_kv_heads,
                          config.head_dim)  # fmt: skip
        self._arena = bytearray(NUM_BLOCKS * layout.block_nbytes)
        self._runner = CompiledRunner(
            config, pack(config, weights, dtype), layout, memoryview(self._arena), NUM_BLOCKS, 2
        )

    def answer(
        self, asked: list[Asked], drafter: Callable[[int], Drafter | None]
    ) -> tuple[list[list[TokenDrawn]], list[Sequence]]:
        limits = Limits(block_size=BLOCK_SIZE, context_length=2048, max_step_tokens=48)
        scheduler = Scheduler(BlockPool(NUM_BLOCKS), limits)
        sequences = [
            Sequence(SequenceId(str(i)), list(a.prompt), a.sampling, a.max_tokens, a.stop_ids, [self._root],
                     drafter=drafter(i))
            for i, a in enumerate(asked)
        ]  # fmt: skip
        for sequence in sequences:
            scheduler.add(sequence)
        told: list[list[TokenDrawn]] = [[] for _ in asked]
        while plan := scheduler.plan():
            for event in scheduler.complete(plan, self._runner.run(build_batch(plan.entries, BLOCK_SIZE))):
                if isinstance(event, TokenDrawn):
                    told[int(event.id)].append(event)
            scheduler.check_integrity()
        assert scheduler.num_sequences == 0
        assert scheduler.pool.counts().active == 0
        return told, sequences


def draws(told: list[list[TokenDrawn]]) -> list[list[Drawn]]:
    return [[event.drawn for event in events] for events in told]


def ids(events: list[TokenDrawn]) -> list[int]:
    return [event.drawn.token_id for event in events]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_drafts_change_no_draw(smollm2: ModelFiles, smollm2_weights: Weights, dtype: str) -> None:
    served = Served(smollm2, smollm2_weights, dtype)
    prompts = [smollm2.tokenizer.encode(text, add_special=True) for text in TEXTS]
    asked = [Asked(prompt, sampling) for prompt in prompts for sampling in (GREEDY, SEEDED)]
    alone = [served.answer([one], lambda _: None)[0][0] for one in asked]
    expected = draws(alone)

    told, sequences = served.answer(asked, lambda _: Drafter())
    assert draws(told) == expected
    assert sum(s.num_accepted for s in sequences) > 10
    assert sum(s.num_preemptions for s in sequences) > 0

    # Right, and wrong at each third place: accepted and refused in one step, for sampled answers too.
    told, sequences = served.answer(asked, lambda i: Oracle(asked[i].prompt + ids(alone[i]), spoilt=i % 2 == 0))
    assert draws(told) == expected
    assert all(s.num_accepted > 0 for s in sequences)
    assert all(s.num_accepted < s.num_drafted for s in sequences[::2])

    # An end in the midst of an accepted run.
    for i in (0, 1):
        answer = ids(alone[i])
        oracle = Oracle(asked[i].prompt + answer)
        short = Asked(asked[i].prompt, asked[i].sampling, max_tokens=7)
        told, _ = served.answer([short], lambda _, oracle=oracle: oracle)
        assert (draws(told)[0], told[0][-1].finish) == (expected[i][:7], FinishReason.LENGTH)
        place = next(n for n in range(4, len(answer)) if answer[n] not in answer[:n])
        stopped = Asked(asked[i].prompt, asked[i].sampling, stop_ids=frozenset({answer[place]}))
        told, _ = served.answer([stopped], lambda _, oracle=oracle: oracle)
        assert (draws(told)[0], told[0][-1].finish) == (expected[i][: place + 1], FinishReason.STOP)
