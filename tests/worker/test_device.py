from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.errors import InvalidRequestError
from services.engine.layout import KvLayout
from services.engine.model_config import ModelError
from services.engine.model_files import open_model
from services.engine.runners import choose_cuda_dtype
from services.engine.weights import weights_on
from services.worker.compute import Compute
from services.worker.config import Kernels, WorkerConfig
from services.worker.device import choose_devices, pick_device, spread
from tests.engine.test_kernels import make_config, make_weights
from tests.tiny_model import save_tiny_model


@pytest.mark.parametrize(
    ("text", "num_gpus", "has_kernels", "expected"),
    [
        ("cpu", 8, True, None), ("auto", 0, True, None), ("auto", 2, False, None), ("auto", 2, True, 0),
        ("cuda", 1, True, 0), ("cuda:3", 4, True, 3),
    ],
)  # fmt: skip
def test_a_device_is_what_was_named(text: str, num_gpus: int, has_kernels: bool, expected: int | None) -> None:
    for compiled in (True, False):
        assert pick_device(text, num_gpus, has_kernels=has_kernels, compiled=compiled) == expected


def test_torch_computes_on_a_gpu_without_flashinfer() -> None:
    assert pick_device("cuda:1", 2, has_kernels=False, compiled=False) == 1


@pytest.mark.parametrize(
    ("text", "num_gpus", "has_kernels", "says"),
    [
        ("gpu", 1, True, "write cpu, cuda, cuda:N or auto"), ("cuda:x", 1, True, "is no device"),
        ("cuda", 0, True, "sees 0 GPUs"), ("cuda:2", 2, True, "sees 2 GPUs"), ("cuda", 1, False, "kvferry\\[worker,gpu\\]"),
    ],
)  # fmt: skip
def test_a_device_that_cannot_be_is_refused_with_what_to_do(
    text: str, num_gpus: int, has_kernels: bool, says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        pick_device(text, num_gpus, has_kernels=has_kernels, compiled=True)


def test_on_a_machine_without_a_driver_the_cpu_is_left() -> None:
    assert choose_devices("cpu", 3, compiled=True) == (None,) * 3


def test_each_rank_has_a_gpu_of_its_own() -> None:
    assert spread(1, 3, 4) == (1, 2, 3)
    assert spread(None, 2, 0) == (None, None)
    with pytest.raises(InvalidRequestError, match="--tp 3 from cuda:1 on needs 4 GPUs, and this process sees 3"):
        spread(1, 3, 3)


def test_types_and_heads_that_the_kernels_lack_are_refused() -> None:
    assert choose_cuda_dtype(make_config(), "auto", compiled=True) == "bfloat16"
    assert choose_cuda_dtype(make_config(), "float16", compiled=True) == "float16"
    for dtype in ("float32", "int8"):
        with pytest.raises(ModelError, match="use --dtype bfloat16 or float16"):
            choose_cuda_dtype(make_config(), dtype, compiled=True)
    with pytest.raises(ModelError, match=r"heads of 48 dimensions.*or --kernels torch"):
        choose_cuda_dtype(make_config(head_dim=48), "auto", compiled=True)


def test_torch_on_a_gpu_has_every_type_but_int8_and_heads_of_any_size() -> None:
    odd = make_config(head_dim=48)
    assert choose_cuda_dtype(odd, "auto", compiled=False) == "bfloat16"
    for dtype in ("float32", "bfloat16", "float16"):
        assert choose_cuda_dtype(odd, dtype, compiled=False) == dtype
    with pytest.raises(ModelError, match="no kernels for GPUs have int8"):
        choose_cuda_dtype(odd, "int8", compiled=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("kernels", "says"),
    [
        (Kernels.TORCH, "reaches no GPU; install one built for CUDA, or use --device cpu"),
        pytest.param(
            Kernels.COMPILED, r"needs FlashInfer .*pip install kvferry\[gpu\]`, or use --kernels torch",
            marks=pytest.mark.skipif(find_spec("flashinfer") is not None, reason="FlashInfer is installed"),
        ),
    ],
)  # fmt: skip
async def test_what_is_to_compute_on_a_gpu_and_cannot_says_what_to_do(
    kernels: Kernels, says: str, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path)
    files = open_model(str(tmp_path))
    model = files.config
    layout = KvLayout(model.revision, "float32", 16, model.num_layers, model.num_kv_heads, model.head_dim)
    on_gpu: Any = SimpleNamespace(device=0)
    compute = Compute(
        files, "float32", layout, (on_gpu,), 4, WorkerConfig(kernels=kernels), log_name="prefill", returns_early=False
    )
    async with AsyncExitStack() as stack:
        with pytest.raises(ModelError, match=says):
            await compute.start(stack, lambda _: None)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_go_where_they_are_computed_with(tied: bool) -> None:
    weights = make_weights(make_config(tied=tied, bias=not tied))
    moved = weights_on(weights, torch.device("meta"))
    assert (moved.head is moved.embedding) == tied
    assert moved.norm.is_meta
    for ours, theirs in zip(moved.layers, weights.layers, strict=True):
        assert ours.qkv.is_meta
        assert ours.qkv.shape == theirs.qkv.shape
        assert (ours.qkv_bias is None) == (theirs.qkv_bias is None)


def test_a_ranks_head_stays_a_part_of_the_embedding() -> None:
    weights = make_weights(make_config(tied=True))
    moved = weights_on(replace(weights, head=weights.embedding[10:30]), torch.device("cpu", 0))
    assert torch.equal(moved.head, weights.embedding[10:30])
    assert moved.head.data_ptr() == moved.embedding[10:].data_ptr()
