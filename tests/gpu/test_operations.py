"""FlashInfer's norms, rotation and gate against plain torch."""

from __future__ import annotations

import pytest
import torch

from services.engine.flashinfer_kernels import FlashInfer
from services.engine.operations.flashinfer_operations import FlashInferOperations
from tests.engine.test_operations import CONFIGS, assert_near_the_reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_kernels_compute_what_torch_does(
    place: torch.device, kernels: FlashInfer, name: str, dtype: torch.dtype
) -> None:
    config = CONFIGS[name]
    assert_near_the_reference(FlashInferOperations(config, kernels, place), config, place, dtype)
