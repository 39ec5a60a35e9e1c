"""FlashInfer's kernels with the plans that CPU tests check, against the same dense sums.  Each type, head dimension, window
or none, and kernel is a module of its own, compiled by the first test that needs it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.attention.flashinfer_attention import WORKSPACE_NBYTES
from services.engine.flashinfer_kernels import FlashInfer
from tests.engine.test_paged_plan import GROUPS, NUMS_NEW, attend, cases, flashinfer_attention

pytestmark = pytest.mark.gpu

MOST_ERROR = {torch.bfloat16: 0.06, torch.float16: 0.01}


@dataclass(frozen=True, slots=True)
class Shape:
    dtype: torch.dtype
    head_dim: int
    windows: tuple[int | None, ...] = (None,)


@dataclass(frozen=True, slots=True)
class Kernel:
    groups: tuple[int, ...]
    nums_new: tuple[int, ...]


SHAPES = {
    "bfloat16, heads of 64": Shape(torch.bfloat16, 64),
    "bfloat16, heads of 128": Shape(torch.bfloat16, 128),
    "bfloat16, heads of 64, windows": Shape(torch.bfloat16, 64, (1, 9, 1000)),
    "float16, heads of 64": Shape(torch.float16, 64),
}
KERNELS = {
    "decoding": Kernel((1, 3), (1,)),
    "decoding by tensor cores": Kernel((4, 7, 8), (1,)),
    "chunks": Kernel(GROUPS, (2, 19)),
    "all of them": Kernel(GROUPS, NUMS_NEW),
}


@pytest.fixture(scope="module")
def workspace(place: torch.device) -> torch.Tensor:
    return torch.zeros(WORKSPACE_NBYTES, dtype=torch.uint8, device=place)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@settings(max_examples=25)
@given(data=st.data())
def test_any_batch_equals_the_dense_sum(
    workspace: torch.Tensor, kernels: FlashInfer, shape: Shape, kernel: Kernel, data: st.DataObject
) -> None:
    case = data.draw(cases(kernel.groups, (shape.head_dim,), shape.windows, kernel.nums_new))
    attention = flashinfer_attention(case, shape.dtype, kernels, workspace)
    # Zeros, not NaN: whether these kernels read what is behind a text is not promised by them.
    attended = attend(case, attention, workspace.device, shape.dtype, stale=0.0)
    assert attended.error < MOST_ERROR[shape.dtype]
    assert not attended.other_layer.any()
