"""The real model against transformers, which reads the same file its own way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from services.engine.batch import Entry, build_batch
from services.engine.layout import KvLayout
from services.engine.model_files import ModelFiles
from services.engine.runner import TorchRunner
from services.engine.sampling_params import Sampling
from services.engine.weights import Weights, load_weights
from tests.engine.paging import GREEDY, PagedModel, relative_error

PROMPTS = [
    "Hi",
    "The capital of France is",
    "Count: 1, 2, 3, 4, 5,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Ünïcode, 日本語 and emoji 🚢🚢 are all text.",
    "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 6,
]


@pytest.fixture(scope="module", params=["kernels", "torch"])
def kernels(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "kernels")


@pytest.fixture(scope="module")
def paged(smollm2: ModelFiles, smollm2_weights: Weights, kernels: bool) -> PagedModel:
    return PagedModel(smollm2.config, smollm2_weights, num_blocks=256, kernels=kernels)


def expected_logits(reference: Any, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    with torch.inference_mode():
        return np.asarray(reference(torch.tensor([ids])).logits[0].numpy())


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("chunk", [None, 13])
def test_prefill_logits_equal_the_reference(prompt: str, chunk: int | None, smollm2: ModelFiles, paged: PagedModel,
                                            reference: Any) -> None:  # fmt: skip
    ids = smollm2.tokenizer.encode(prompt, add_special=True)
    assert relative_error(paged.prompt_logits(ids, chunk), expected_logits(reference, ids)[-1]) < 1e-5


def test_greedy_tokens_equal_the_reference_in_mixed_batches(smollm2: ModelFiles, smollm2_weights: Weights,
                                                            reference: Any, kernels: bool) -> None:  # fmt: skip
    paged = PagedModel(smollm2.config, smollm2_weights, num_blocks=96, seed=7, kernels=kernels)
    prompts = [smollm2.tokenizer.encode(prompt, add_special=True) for prompt in PROMPTS]
    answers = paged.greedy(prompts, num_tokens=40, chunk=24)
    for prompt, answer in zip(prompts, answers, strict=True):
        # Greedy decoding is its own continuation: each token is the likeliest after all before it.
        logits = expected_logits(reference, prompt + answer)
        assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_the_block_size_changes_nothing(smollm2: ModelFiles, smollm2_weights: Weights, paged: PagedModel) -> None:
    ids = smollm2.tokenizer.encode(PROMPTS[3], add_special=True)
    small = PagedModel(smollm2.config, smollm2_weights, num_blocks=32, block_size=4)
    assert relative_error(small.prompt_logits(ids), paged.prompt_logits(ids)) < 1e-5


def test_a_changed_block_changes_the_answer(smollm2: ModelFiles, paged: PagedModel) -> None:
    ids = smollm2.tokenizer.encode(PROMPTS[5], add_special=True)
    table = paged.table(len(ids) + 1)
    before = paged.logits([Entry(ids, 0, table, GREEDY)])
    nbytes = paged.layout.block_nbytes
    paged.arena[table[1] * nbytes : (table[1] + 1) * nbytes] = bytes(nbytes)
    after = paged.logits([Entry(ids[-1:], len(ids) - 1, table, GREEDY)])
    assert relative_error(after, before) > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_two_byte_types_agree_within_their_precision(
    smollm2: ModelFiles, reference: Any, dtype: str, tolerance: float, kernels: bool
) -> None:
    if kernels and dtype == "float16":
        pytest.skip("the kernels have no float16")
    weights = load_weights(smollm2.config, smollm2.path, dtype)
    paged = PagedModel(smollm2.config, weights, num_blocks=16, dtype=dtype, kernels=kernels)
    ids = smollm2.tokenizer.encode(PROMPTS[3], add_special=True)
    assert relative_error(paged.prompt_logits(ids), expected_logits(reference, ids)[-1]) < tolerance


def test_a_batch_that_samples_nothing_draws_nothing(paged: PagedModel) -> None:
    assert paged.runner.run(build_batch([Entry([1, 2, 3], 0, paged.table(3), None)], paged.block_size)) == []


def test_warming_up_leaves_the_pool_alone(paged: PagedModel) -> None:
    before = bytes(paged.arena)
    paged.runner.warm_up()
    assert paged.arena == before


def test_a_seeded_draw_does_not_depend_on_its_company(smollm2: ModelFiles, paged: PagedModel) -> None:
    ids = smollm2.tokenizer.encode("Once upon a time", add_special=True)
    wild = Sampling(temperature=1.5, seed=99, num_logprobs=2)
    company = [Entry([5] * n, 0, paged.table(n), Sampling(temperature=1.0, seed=n)) for n in (3, 20)]
    own = Entry(ids, 0, paged.table(len(ids)), wild)
    alone = paged.runner.run(build_batch([own], paged.block_size))[0]
    among = paged.runner.run(build_batch([company[0], own, company[1]], paged.block_size))[1]
    assert among.token_id == alone.token_id
    assert among.logprob == pytest.approx(alone.logprob, abs=1e-4)


def test_a_runner_refuses_a_pool_that_does_not_fit(smollm2: ModelFiles, smollm2_weights: Weights) -> None:
    config = smollm2.config
    layout = KvLayout(config.revision, "float32", 16, config.num_layers, config.num_kv_heads, config.head_dim)
    with pytest.raises(ValueError, match="writable bytes"):
        TorchRunner(config, smollm2_weights, layout, memoryview(bytearray(100)), 1, 1)
    with pytest.raises(ValueError, match="writable bytes"):
        TorchRunner(config, smollm2_weights, layout, memoryview(bytes(layout.block_nbytes)), 1, 1)
    other = KvLayout("other", "float32", 16, config.num_layers, config.num_kv_heads, config.head_dim)
    with pytest.raises(ValueError, match="another model"):
        TorchRunner(config, smollm2_weights, other, memoryview(bytearray(other.block_nbytes)), 1, 1)
    half = KvLayout(config.revision, "bfloat16", 16, config.num_layers, config.num_kv_heads, config.head_dim)
    with pytest.raises(ValueError, match="bfloat16"):
        TorchRunner(config, smollm2_weights, half, memoryview(bytearray(half.block_nbytes)), 1, 1)
