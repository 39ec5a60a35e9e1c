"""What a worker makes of its settings."""

from __future__ import annotations

import pytest

from services.runtime.config import load
from services.worker.config import WorkerConfig


@pytest.mark.parametrize(("chunk", "on_cpu", "on_gpu"), [(0, 256, 2048), (512, 512, 512)])
def test_tokens_of_a_step(chunk: int, on_cpu: int, on_gpu: int) -> None:
    config = WorkerConfig(chunk_tokens=chunk)
    assert config.num_step_tokens(on_gpu=False) == on_cpu
    assert config.num_step_tokens(on_gpu=True) == on_gpu


def test_what_a_step_takes_on_a_gpu_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(WorkerConfig, ["--help"], "worker")
    assert "256 on CPUs, 2048 on GPUs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("chunk", "mixed", "on_cpu", "on_gpu"),
    [(0, 0, 64, 2048), (256, 0, 64, 256), (256, 16, 16, 16), (3, 0, 1, 3), (64, 256, 256, 256)],
)
def test_prompt_tokens_beside_decoding(chunk: int, mixed: int, on_cpu: int, on_gpu: int) -> None:
    config = WorkerConfig(chunk_tokens=chunk, mixed_chunk_tokens=mixed)
    assert config.num_mixed_tokens(on_gpu=False) == on_cpu
    assert config.num_mixed_tokens(on_gpu=True) == on_gpu
