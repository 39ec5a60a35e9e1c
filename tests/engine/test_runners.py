from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from services.engine.kernels import build
from services.engine.kernels.library import load
from services.engine.kernels.packed import PackedWeights
from services.engine.kernels.packing import pack
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig, ModelError
from services.engine.model_files import ModelFiles
from services.engine.runner import TorchRunner
from services.engine.runners import AUTO, choose_dtype, create_runner, kv_dtype, load_for_runner
from services.engine.weights import Weights
from tests.engine.test_kernels import make_config, make_weights


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(build, "BUILD", tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_torch_computes_and_one_line_says_so(smollm2: ModelFiles) -> None:
    with capture_logs() as lines:
        weights = load_for_runner(smollm2.config, smollm2.path, "float32", compiled=True)
        assert isinstance(weights, Weights)
        runner = create_runner(smollm2.config, weights, *_pool(smollm2.config, "float32"), 1)
    assert isinstance(runner, TorchRunner)
    assert [(line["event"], line["log_level"]) for line in lines] == [("plain_torch", "warning")]
    assert "apt-get install gcc, then make setup" in lines[0]["reason"]


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_int8_is_refused(smollm2: ModelFiles) -> None:
    with pytest.raises(ModelError, match=r"int8 needs the compiled kernels .*apt-get install gcc.*--dtype bfloat16"):
        load_for_runner(smollm2.config, smollm2.path, "int8", compiled=True)


def test_what_the_kernels_do_not_know_goes_to_torch() -> None:
    config = make_config(head_dim=48)
    with pytest.raises(ModelError, match="heads of 48 dimensions"):
        load_for_runner(config, Path("/nowhere"), "int8", compiled=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_packed_while_they_are_read_are_the_same(dtype: str, smollm2: ModelFiles,
                                                         smollm2_weights: Weights) -> None:  # fmt: skip
    streamed = load_for_runner(smollm2.config, smollm2.path, dtype, compiled=True)
    assert isinstance(streamed, PackedWeights)
    whole = pack(smollm2.config, smollm2_weights, dtype)
    assert torch.equal(streamed.embedding.values, whole.embedding.values)
    assert torch.equal(streamed.layers[-1].down.values, whole.layers[-1].down.values)
    assert streamed.head is streamed.embedding
    layers, head = {"float32": (4, 4), "bfloat16": (2, 2), "int8": (1 / 2 + 4 / 32, 1 + 4 / 32)}[dtype]
    assert streamed.weight_nbytes == (layers, head)  # the file has Q4_1 in its layers, and a head in Q8_0
    assert streamed.nbytes == pytest.approx(106.17e6 * layers + 28.31e6 * head, rel=1e-3)
    runner = create_runner(smollm2.config, streamed, *_pool(smollm2.config, dtype), 2)
    runner.warm_up()


def test_an_unknown_type_is_refused_with_what_there_is(smollm2: ModelFiles) -> None:
    with pytest.raises(ModelError, match="'int4' is not supported; supported are float32, bfloat16, float16, int8"):
        load_for_runner(smollm2.config, smollm2.path, "int4", compiled=True)


def test_untied_and_biased_models_are_packed_whole() -> None:
    config = replace(make_config(tied=False, bias=True, hidden_size=96, inner=64))
    packed = pack(config, make_weights(config), "int8")
    assert packed.head is not packed.embedding
    assert all(layer.qkv_bias is not None and len(layer.qkv_bias) == layer.qkv.num_rows for layer in packed.layers)


def _pool(config: ModelConfig, dtype: str) -> tuple[KvLayout, memoryview, int]:
    layout = KvLayout(config.revision, kv_dtype(dtype), 16, config.num_layers, config.num_kv_heads, config.head_dim)
    return layout, memoryview(bytearray(2 * layout.block_nbytes)), 2


def test_auto_is_int8_with_the_kernels_and_float32_without(smollm2: ModelFiles) -> None:
    assert choose_dtype(smollm2.config, AUTO, compiled=True) == "int8"
    assert choose_dtype(smollm2.config, AUTO, compiled=False) == "float32"
    assert choose_dtype(make_config(head_dim=48), AUTO, compiled=True) == "float32"
    assert choose_dtype(smollm2.config, "bfloat16", compiled=True) == "bfloat16"


@pytest.mark.usefixtures("no_compiler")
def test_auto_is_float32_without_a_compiler(smollm2: ModelFiles) -> None:
    assert choose_dtype(smollm2.config, AUTO, compiled=True) == "float32"
