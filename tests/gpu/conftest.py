"""`make test-gpu`.  Nothing here has run on a device yet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.engine.flashinfer_kernels import FlashInfer, load
from tests.gpu.needs import why_not

# What compiles kernels, those that compile the least first; all else runs before.
COMPILING = ("test_operations", "test_attention", "test_sampler", "test_runner", "test_split", "test_ranks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = [number for number, item in enumerate(items) if item.path.parent == here]
    ordered = sorted((items[number] for number in places), key=lambda item: _turn(item.path.stem))
    for number, item in zip(places, ordered, strict=True):
        items[number] = item


def _turn(module: str) -> int:
    return COMPILING.index(module) if module in COMPILING else -1


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def place(_gpu: None) -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def kernels(_gpu: None) -> FlashInfer:
    return load()
