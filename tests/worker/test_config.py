"""What a worker makes of its settings."""

from __future__ import annotations

import pytest

from services.worker.config import WorkerConfig


@pytest.mark.parametrize(
    ("chunk", "mixed", "on_cpu", "on_gpu"), [(256, 0, 64, 256), (256, 16, 16, 16), (3, 0, 1, 3), (64, 256, 256, 256)]
)
def test_prompt_tokens_beside_decoding(chunk: int, mixed: int, on_cpu: int, on_gpu: int) -> None:
    config = WorkerConfig(chunk_tokens=chunk, mixed_chunk_tokens=mixed)
    assert config.num_mixed_tokens(on_gpu=False) == on_cpu
    assert config.num_mixed_tokens(on_gpu=True) == on_gpu
