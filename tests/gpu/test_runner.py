"""SmolLM2 on the device against SmolLM2 in float32 on the CPU."""

from __future__ import annotations

import pytest
import torch

from services.engine.batch import Entry, build_batch
from services.engine.device import CudaDevice
from services.engine.flashinfer_kernels import FlashInfer
from services.engine.flashinfer_runner import FlashInferRunner
from services.engine.layout import KvLayout
from services.engine.model_files import ModelFiles
from services.engine.weights import Weights, load_weights, weights_on
from tests.engine.early_chunks import ship
from tests.engine.paging import GREEDY, PagedModel, assert_likely, decode_together, relative_error

pytestmark = pytest.mark.gpu

PROMPTS = (
    "The capital of France is", "1, 2, 3, 5, 8, 13,", "def fibonacci(n):", "Once upon a time",
    "It was a bright cold day in April, and the clocks were striking",
)  # fmt: skip
NUM_BLOCKS = 64


@pytest.fixture(scope="module")
def layout(smollm2: ModelFiles) -> KvLayout:
    config = smollm2.config
    return KvLayout(config.revision, "bfloat16", 16, config.num_layers, config.num_kv_heads, config.head_dim)


@pytest.fixture(scope="module")
def weights(place: torch.device, smollm2: ModelFiles) -> Weights:
    return weights_on(load_weights(smollm2.config, smollm2.path, "bfloat16"), place)


@pytest.fixture(scope="module")
def runner(
    place: torch.device, kernels: FlashInfer, smollm2: ModelFiles, weights: Weights, layout: KvLayout
) -> FlashInferRunner:
    arena = torch.zeros((NUM_BLOCKS, *layout.block_shape), dtype=torch.bfloat16, device=place)
    made = FlashInferRunner(
        smollm2.config, weights, layout, arena, kernels, CudaDevice(place), max_running=6, returns_early=False
    )
    made.warm_up()
    return made


@pytest.fixture
def reference(smollm2: ModelFiles) -> PagedModel:
    return PagedModel(smollm2.config, load_weights(smollm2.config, smollm2.path, "float32"), num_blocks=NUM_BLOCKS)


def test_prefill_logits_are_near_the_references(
    runner: FlashInferRunner, reference: PagedModel, smollm2: ModelFiles
) -> None:
    ids = smollm2.tokenizer.encode(PROMPTS[0] * 8, add_special=True)
    found = runner.logits(build_batch([Entry(ids, 0, range(NUM_BLOCKS), GREEDY)], 16))[0]
    assert relative_error(found, reference.prompt_logits(ids)) < 0.05


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 5])
def test_decoding_by_graphs_draws_what_float32_finds_likely(
    runner: FlashInferRunner, reference: PagedModel, smollm2: ModelFiles, num_sequences: int
) -> None:
    """Of sizes that graphs have, and of some that are padded."""
    texts = [smollm2.tokenizer.encode(prompt, add_special=True) for prompt in PROMPTS[:num_sequences]]
    foreseen = runner.num_foreseen
    found = decode_together(runner.run, texts, GREEDY, 32, 16)
    assert runner.num_foreseen - foreseen == 30  # the first decode comes behind a prompt
    for text, drawn in zip(texts, found, strict=True):
        assert_likely(reference, text, drawn)


def test_chunks_arrive_elsewhere_while_the_next_ones_compute(
    place: torch.device, kernels: FlashInfer, smollm2: ModelFiles, weights: Weights, layout: KvLayout
) -> None:
    busy = torch.randn(4096, 4096, device=place)

    def keep_busy() -> None:
        nonlocal busy
        for _ in range(50):
            busy = busy @ busy / 64

    def make(arena: torch.Tensor) -> FlashInferRunner:
        return FlashInferRunner(
            smollm2.config, weights, layout, arena, kernels, CudaDevice(place), max_running=1, returns_early=True
        )

    ids = (smollm2.tokenizer.encode(PROMPTS[4], add_special=True) * 50)[: NUM_BLOCKS * 16]
    shipped = ship(make, keep_busy, layout, ids, place.index)
    assert shipped.num_pending >= shipped.num_chunks - 1 > 3  # the first one may have had to compile
    assert shipped.arrived == shipped.sent
    assert any(shipped.arrived[-layout.block_nbytes :])
