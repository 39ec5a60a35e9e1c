"""`make test-gpu`.  Nothing here has run on a device yet."""

from __future__ import annotations

import importlib.util

import pytest
import torch


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device, or a torch without CUDA: nothing of tests/gpu has run"
    if importlib.util.find_spec("flashinfer") is None:
        return "FlashInfer is not installed: pip install kvferry[gpu]"
    return None


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def place(_gpu: None) -> torch.device:
    return torch.device("cuda", 0)
