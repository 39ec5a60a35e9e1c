"""The real model, and transformers' own reading of it; loaded once for all tests."""

from __future__ import annotations

import signal
from typing import Any

import hypothesis
import pytest
import torch

from services.engine.checkpoint import DEFAULT_MODEL
from services.engine.model_files import ModelFiles, open_model

# A shell's background jobs ignore SIGINT and hand that down: children of the tests get it as from a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine that others use can be slow at any example.
hypothesis.settings.register_profile("shared", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("shared")


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    return open_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def reference(smollm2: ModelFiles) -> Any:
    """transformers in float32 on the same file: what every answer is held against."""
    from transformers import AutoModelForCausalLM

    path = smollm2.path
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
