"""FlashInfer's kernels with the plans that CPU tests check, against the same dense sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from services.engine.attention.flashinfer_attention import WORKSPACE_NBYTES, AttentionShape, FlashInferAttention
from services.engine.flashinfer_kernels import load
from tests.engine.test_paged_plan import LAYER, Case, cases, dense_sum

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_batch_equals_the_dense_sum(place: torch.device, dtype: torch.dtype, case: Case) -> None:
    num_kv_heads, head_dim = case.arena.shape[-2:]
    shape = AttentionShape(case.queries.shape[1], num_kv_heads, head_dim, case.page_size, case.window, dtype)
    workspace = torch.zeros(WORKSPACE_NBYTES, dtype=torch.uint8, device=place)
    plan = FlashInferAttention(shape, load(), place, workspace).plan(case.batch)
    new = np.concatenate([text[:, text.shape[1] - num_new :] for text, num_new in case.texts], axis=1)
    key, value = torch.from_numpy(new).to(place, dtype)
    # Zeros, not NaN: whether these kernels read what is behind a text is not promised by them.
    arena = case.arena.nan_to_num(0.0).to(place, dtype)
    plan.append(key, value, arena[:, LAYER])
    found = plan.run(case.queries.to(place, dtype), arena[:, LAYER])
    assert np.abs(found.double().cpu().numpy() - dense_sum(case)).max() < (0.06 if dtype == torch.bfloat16 else 0.01)
