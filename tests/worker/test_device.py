from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.errors import InvalidRequestError
from services.engine.layout import KvLayout
from services.engine.model_config import ModelError
from services.engine.runners import choose_cuda_dtype, create_cuda_runner
from services.engine.weights import weights_on
from services.worker.device import choose_devices, pick_device, spread
from tests.engine.test_kernels import make_config, make_weights


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
def test_a_torch_that_reaches_no_gpu_says_what_to_do() -> None:
    config = make_config()
    layout = KvLayout(config.revision, "float32", 16, config.num_layers, config.num_kv_heads, config.head_dim)
    pool: Any = SimpleNamespace(device=0)
    with pytest.raises(ModelError, match="reaches no GPU; install one built for CUDA, or use --device cpu"):
        create_cuda_runner(
            config, make_weights(config), layout, pool, 4, compiled=False, max_running=4, returns_early=False
        )


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
