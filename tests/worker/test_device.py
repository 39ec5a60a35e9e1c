from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvferry.errors import InvalidRequestError
from services.engine.model_config import ModelError
from services.engine.runners import choose_cuda_dtype
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
    assert pick_device(text, num_gpus, has_kernels=has_kernels) == expected


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
        pick_device(text, num_gpus, has_kernels=has_kernels)


def test_on_a_machine_without_a_driver_the_cpu_is_left() -> None:
    assert choose_devices("cpu", 3) == (None,) * 3


def test_each_rank_has_a_gpu_of_its_own() -> None:
    assert spread(1, 3, 4) == (1, 2, 3)
    assert spread(None, 2, 0) == (None, None)
    with pytest.raises(InvalidRequestError, match="--tp 3 from cuda:1 on needs 4 GPUs, and this process sees 3"):
        spread(1, 3, 3)


def test_types_and_heads_that_the_kernels_lack_are_refused() -> None:
    assert choose_cuda_dtype(make_config(), "auto") == "bfloat16"
    assert choose_cuda_dtype(make_config(), "float16") == "float16"
    for dtype in ("float32", "int8"):
        with pytest.raises(ModelError, match="use --dtype bfloat16 or float16"):
            choose_cuda_dtype(make_config(), dtype)
    with pytest.raises(ModelError, match="heads of 48 dimensions"):
        choose_cuda_dtype(make_config(head_dim=48), "auto")


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
