"""Plain torch on the device, which the kernels are held against, against the same sums on the host."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

from services.engine.operations.torch_operations import TorchOperations
from tests.engine.test_operations import CONFIGS, MOST_ERROR, assert_near_the_reference
from tests.engine.test_paged_plan import Case, attend, cases, torch_attention

pytestmark = pytest.mark.gpu


@settings(max_examples=30)
@given(case=cases())
def test_attention_of_any_batch_equals_the_dense_sum(place: torch.device, case: Case) -> None:
    attended = attend(case, torch_attention(case, place), place, torch.float32, stale=math.nan)
    assert attended.error < 0.01  # some of torch's kernels multiply in TF32
    assert attended.other_layer.isnan().all()


@pytest.mark.parametrize("dtype", MOST_ERROR, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_operations_equal_those_of_the_host(place: torch.device, name: str, dtype: torch.dtype) -> None:
    assert_near_the_reference(TorchOperations(CONFIGS[name], place, dtype), CONFIGS[name], place, dtype)
