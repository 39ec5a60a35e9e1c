"""A worker's two ranks on two GPUs, over NCCL."""

from __future__ import annotations

import json

import pytest
import torch

from services.engine.model_files import ModelFiles
from services.engine.weights import load_weights
from tests.engine.paging import PagedModel, assert_likely
from tests.worker.leading import PROMPTS
from tests.worker.test_ranks import leader

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_draw_what_float32_finds_likely(smollm2: ModelFiles) -> None:
    with leader(smollm2, "bfloat16", "gpu") as two:
        greedy: list[list[int]] = json.loads(two.hear("tokens"))
    reference = PagedModel(smollm2.config, load_weights(smollm2.config, smollm2.path, "float32"), num_blocks=64)
    for text, drawn in zip(PROMPTS, greedy, strict=True):
        assert_likely(reference, smollm2.tokenizer.encode(text, add_special=True), drawn)
