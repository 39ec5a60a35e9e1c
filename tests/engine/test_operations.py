"""A layer's small parts as FlashInfer's kernels are asked for them, against plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.engine.model_config import Llama3Scaling, ModelConfig
from services.engine.operations.base import Operations
from services.engine.operations.flashinfer_operations import FlashInferOperations
from services.engine.operations.torch_operations import TorchOperations
from tests.engine import fake_flashinfer
from tests.engine.paging import relative_error
from tests.engine.test_kernels import make_config

CPU = torch.device("cpu")
NUM_TOKENS = 37
PLAIN = make_config(hidden_size=576, inner=1536)  # widths of SmolLM2
CONFIGS = {"plain": PLAIN, "scaled": replace(PLAIN, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 512))}
MOST_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def results(operations: Operations, config: ModelConfig, place: torch.device, dtype: torch.dtype,
            rounded_to: torch.dtype) -> dict[str, torch.Tensor]:  # fmt: skip
    """Of the same numbers every time, rounded to the one type and given in the other."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(rounded_to).to(place, dtype)

    num_heads = config.num_heads + 2 * config.num_kv_heads
    heads = random(NUM_TOKENS, num_heads * config.head_dim).view(NUM_TOKENS, -1, config.head_dim)
    query, key, _ = heads.split_with_sizes((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
    positions = torch.randint(config.context_length, (NUM_TOKENS,), generator=generator, dtype=torch.int32)
    weight = random(config.hidden_size)
    normalized = operations.normalize(random(NUM_TOKENS, config.hidden_size), weight)
    hidden, addend = (random(NUM_TOKENS, config.hidden_size) for _ in range(2))
    total, total_normalized = operations.add_and_normalize(hidden, addend, weight)
    query, key = operations.rotation(positions.to(place))(query, key)
    gated = operations.gate(random(NUM_TOKENS, 2 * config.intermediate_size))
    return {
        "norm": normalized, "sum": total, "norm of the sum": total_normalized, "queries": query, "keys": key, "gate": gated,
    }  # fmt: skip


def assert_near_the_reference(
    operations: Operations, config: ModelConfig, place: torch.device, dtype: torch.dtype
) -> None:
    reference = TorchOperations(config, CPU, torch.float32)
    expected = results(reference, config, CPU, torch.float32, rounded_to=dtype)
    for name, found in results(operations, config, place, dtype, rounded_to=dtype).items():
        assert found.dtype == dtype, name
        assert relative_error(found.float().cpu().numpy(), expected[name].numpy()) < MOST_ERROR[dtype], name


@pytest.mark.parametrize("dtype", MOST_ERROR, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_kernels_are_asked_for_what_torch_computes(config: ModelConfig, dtype: torch.dtype) -> None:
    assert_near_the_reference(FlashInferOperations(config, fake_flashinfer, CPU), config, CPU, dtype)


@pytest.mark.parametrize("dtype", MOST_ERROR, ids=str)
def test_rounded_numbers_are_near_as_well(dtype: torch.dtype) -> None:
    assert_near_the_reference(TorchOperations(PLAIN, CPU, dtype), PLAIN, CPU, dtype)
