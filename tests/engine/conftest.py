from __future__ import annotations

from typing import Any

import pytest
import torch

from services.engine.model_files import ModelFiles
from services.engine.weights import Weights, load_weights


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_weights(smollm2: ModelFiles) -> Weights:
    return load_weights(smollm2.config, smollm2.path, "float32")


@pytest.fixture(scope="session")
def reference_tokenizer(smollm2: ModelFiles) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.path.parent, gguf_file=smollm2.path.name)
