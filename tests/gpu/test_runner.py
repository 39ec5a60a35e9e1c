"""SmolLM2 on the device against SmolLM2 in float32 on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.engine.batch import Entry, build_batch
from services.engine.device import CudaDevice
from services.engine.flashinfer_kernels import load
from services.engine.flashinfer_runner import FlashInferRunner
from services.engine.layout import KvLayout
from services.engine.model_files import ModelFiles
from services.engine.sampling_params import Drawn
from services.engine.weights import load_weights, weights_on
from tests.engine.paging import GREEDY, PagedModel, relative_error

pytestmark = pytest.mark.gpu

PROMPT = "The capital of France is"
NUM_BLOCKS = 64


@pytest.fixture(scope="module")
def runner(place: torch.device, smollm2: ModelFiles) -> FlashInferRunner:
    config = smollm2.config
    layout = KvLayout(config.revision, "bfloat16", 16, config.num_layers, config.num_kv_heads, config.head_dim)
    arena = torch.zeros((NUM_BLOCKS, *layout.block_shape), dtype=torch.bfloat16, device=place)
    weights = weights_on(load_weights(config, smollm2.path, "bfloat16"), place)
    made = FlashInferRunner(
        config, weights, layout, arena, load(), CudaDevice(place), max_running=4, returns_early=False
    )
    made.warm_up()
    return made


def test_prefill_logits_are_near_the_references(runner: FlashInferRunner, smollm2: ModelFiles) -> None:
    ids = smollm2.tokenizer.encode(PROMPT * 8, add_special=True)
    paged = PagedModel(smollm2.config, load_weights(smollm2.config, smollm2.path, "float32"), num_blocks=NUM_BLOCKS)
    found = runner.logits(build_batch([Entry(ids, 0, list(range(NUM_BLOCKS)), GREEDY)], 16))[0]
    assert relative_error(found, paged.prompt_logits(ids)) < 0.05


def test_decoding_by_graphs_draws_what_float32_finds_likely(runner: FlashInferRunner, smollm2: ModelFiles) -> None:
    """Greedy tokens of bfloat16 differ where two are as good as equal: each must be among float32's best two."""
    ids = smollm2.tokenizer.encode(PROMPT, add_special=True)
    table = list(range(NUM_BLOCKS))
    tokens = list(ids)
    start = 0
    foreseen = runner.num_foreseen
    for _ in range(32):
        (drawn,) = runner.run(build_batch([Entry(tokens[start:], start, table, GREEDY)], 16))
        assert isinstance(drawn, Drawn)
        start = len(tokens)
        tokens.append(drawn.token_id)
    assert runner.num_foreseen - foreseen >= 30
    paged = PagedModel(smollm2.config, load_weights(smollm2.config, smollm2.path, "float32"), num_blocks=NUM_BLOCKS)
    best = paged.table(len(tokens))
    for end in range(len(ids), len(tokens)):
        begin = 0 if end == len(ids) else end - 1
        logits = paged.logits([Entry(tokens[begin:end], begin, best, GREEDY)])[0]
        assert tokens[end] in np.argsort(logits)[-2:]
