"""Draws on the device by FlashInfer's top_k, against the host's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.flashinfer_kernels import FlashInfer
from services.engine.flashinfer_runner import top_k_of
from services.engine.sampler import draw
from tests.engine.test_device_sampler import draws, on_device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@settings(max_examples=100)
@given(data=st.data())
def test_draws_are_those_of_the_host(
    place: torch.device, kernels: FlashInfer, dtype: torch.dtype, data: st.DataObject
) -> None:
    logits, samples = data.draw(draws((3000, 49152), dtype))
    found, _ = on_device(logits.to(place), samples, top_k_of(kernels))
    assert found == draw(logits.float().numpy(), samples)
