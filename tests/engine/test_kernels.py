"""The compiled kernels against plain torch over made-up models, on every instruction set that this processor has."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.batch import Batch, Entry, build_batch
from services.engine.kernels import build
from services.engine.kernels.library import KernelsUnavailable, instruction_sets, load
from services.engine.kernels.packing import PackedMatrix, pack
from services.engine.kernels.runner import CompiledRunner
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.model_files import ModelFiles
from services.engine.runner import TorchRunner
from services.engine.sampling_params import Sample, Sampling
from services.engine.weights import DTYPES, LayerWeights, Weights
from tests.engine.paging import PagedModel, relative_error

SETS = instruction_sets()
GREEDY = Sampling()


def make_config(*, sharing: int = 3, num_kv_heads: int = 2, head_dim: int = 64, hidden_size: int = 72, inner: int = 88,
                vocab_size: int = 101, window: int | None = None, bias: bool = False, tied: bool = True,
                ) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        name="made-up",
        revision="r",
        architecture="llama",
        hidden_size=hidden_size,
        num_layers=2,
        num_heads=sharing * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=vocab_size,
        context_length=4096,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        sliding_window=window,
        qkv_bias=bias,
        tied_embeddings=tied,
        bos_token_id=None,
        eos_token_ids=(),
    )


def make_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Large enough for every part to show in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (1.0 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5)

    hidden, inner, size = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    qkv = size + 2 * config.num_kv_heads * config.head_dim
    layers = tuple(
        LayerWeights(
            attention_norm=random(hidden),
            qkv=random(qkv, hidden),
            qkv_bias=random(qkv) if config.qkv_bias else None,
            output=random(hidden, size),
            mlp_norm=random(hidden),
            gate_up=random(2 * inner, hidden),
            down=random(hidden, inner),
        )
        for _ in range(config.num_layers)
    )
    embedding = random(config.vocab_size, hidden)
    head = embedding if config.tied_embeddings else random(config.vocab_size, hidden)
    return Weights(embedding, layers, random(hidden), head)


def on_sixteen_steps(weights: Weights) -> Weights:
    """All but the first layer's way down, zero among them."""

    def matrix(tensor: torch.Tensor) -> torch.Tensor:
        groups = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % 32)).view(len(tensor), -1, 32)
        least, greatest = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
        step = ((greatest - least) / 15).half().float()
        found = ((groups - least) / step).round().clamp(0, 15) * step + least
        return found.view(len(tensor), -1)[:, : tensor.shape[1]].contiguous()

    names = ("qkv", "output", "gate_up", "down")
    layers = [replace(layer, **{n: matrix(getattr(layer, n)) for n in names}) for layer in weights.layers]
    layers[0] = replace(layers[0], down=weights.layers[0].down)
    embedding = matrix(weights.embedding)
    head = embedding if weights.head is weights.embedding else matrix(weights.head)
    return Weights(embedding, tuple(layers), weights.norm, head)


def weights_of(config: ModelConfig, form: str, seed: int = 0) -> tuple[Weights, str]:
    """And the type that they are packed as: "int4" are weights that int8 has in 4 bits."""
    weights = make_weights(config, seed)
    return (on_sixteen_steps(weights), "int8") if form == "int4" else (weights, form)


def rounded(weights: Weights, dtype: str) -> Weights:
    """What a narrow format makes of the weights, as float32."""

    def matrix(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16().float() if dtype == "bfloat16" else int8_weights(tensor)

    names = ("qkv", "output", "gate_up", "down")
    layers = tuple(replace(layer, **{n: matrix(getattr(layer, n)) for n in names}) for layer in weights.layers)
    embedding = matrix(weights.embedding)
    head = embedding if weights.head is weights.embedding else matrix(weights.head)
    return Weights(embedding, layers, weights.norm, head)


def int8_weights(tensor: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] as int8 makes them, from what was packed as the head of a model."""
    vocab_size, hidden_size = tensor.shape
    config = make_config(vocab_size=vocab_size, hidden_size=hidden_size, tied=False)
    return unpacked(pack(config, replace(make_weights(config), head=tensor), "int8").head)[:vocab_size, :hidden_size]


def unpacked(matrix: PackedMatrix) -> torch.Tensor:
    """[outputs, inputs], both padded."""
    assert matrix.scales is not None
    values, parts = matrix.values, 8
    if matrix.format == "int4":
        values, parts = torch.stack([matrix.values.view(-1, 32, 2) >> 4 * n & 15 for n in range(4)], dim=1), 128
    columns = matrix.num_columns
    groups = values.reshape(-1, columns // 2, 32, 2).permute(0, 2, 1, 3).reshape(matrix.num_rows, -1, 32)
    pairs = matrix.scales.view(-1, columns // 32, 2, 32).permute(2, 0, 3, 1).reshape(2, matrix.num_rows, -1, 1)
    scales, bases = pairs[0].view(torch.float16).float(), pairs[1]
    whole = groups.to(torch.int32) * parts + bases
    assert whole.abs().max() < 2048
    return (whole * (scales / parts)).view(matrix.num_rows, columns)


@dataclass(frozen=True)
class Made:
    """Contexts of given lengths in a pool, blocks in random order, everything that holds no token NaN; and a step."""

    batch: Batch
    arena: bytearray
    num_blocks: int
    layout: KvLayout

    @classmethod
    def of(cls, config: ModelConfig, shape: list[tuple[int, int]], block_size: int, dtype: str, seed: int) -> Made:
        """``shape``: for each sequence, how many tokens are in the pool and how many are new."""
        rng = np.random.default_rng(seed)
        layout = KvLayout("r", dtype, block_size, config.num_layers, config.num_kv_heads, config.head_dim)
        tables = [-(-(start + count) // block_size) for start, count in shape]
        num_blocks = sum(tables) + 2
        free = rng.permutation(num_blocks).tolist()
        pool = torch.full((num_blocks, *layout.block_shape), float("nan"), dtype=DTYPES[dtype])
        entries = []
        for (start, count), size in zip(shape, tables, strict=True):
            table = [free.pop() for _ in range(size)]
            for position in range(start):
                kv = torch.from_numpy(rng.standard_normal((config.num_layers, 2, *layout.block_shape[3:])))
                pool[table[position // block_size], :, :, position % block_size] = kv.to(DTYPES[dtype])
            ids = rng.integers(0, config.vocab_size, count).tolist()
            entries.append(Entry(ids, start, table, GREEDY))
        arena = bytearray(pool.view(torch.uint8).numpy().tobytes())
        return cls(build_batch(entries, block_size), arena, num_blocks, layout)

    def copy(self) -> Made:
        return replace(self, arena=bytearray(self.arena))

    def kv(self) -> npt.NDArray[np.float32]:
        pool = torch.frombuffer(self.arena, dtype=DTYPES[self.layout.dtype]).float()
        return np.nan_to_num(pool.numpy(), nan=7e7)

    def run(self, config: ModelConfig, weights: Weights, dtype: str, name: str, threads: int = 2,
            ) -> npt.NDArray[np.float32]:  # fmt: skip
        pool = (self.layout, memoryview(self.arena), self.num_blocks)
        runner = CompiledRunner(config, pack(config, weights, dtype), *pool, threads, instruction_set=name)
        return runner.logits(self.batch)

    def run_torch(self, config: ModelConfig, weights: Weights) -> npt.NDArray[np.float32]:
        return TorchRunner(config, weights, self.layout, memoryview(self.arena), self.num_blocks, 1).logits(self.batch)


models = st.builds(
    make_config,
    sharing=st.sampled_from([1, 3, 4, 7, 8, 13]),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([32, 64, 128]),
    hidden_size=st.sampled_from([32, 72, 96, 192]),
    inner=st.sampled_from([30, 64, 160]),
    window=st.sampled_from([None, None, 1, 20, 300]),
    bias=st.booleans(),
    tied=st.booleans(),
)
decodes = st.lists(st.tuples(st.integers(0, 700), st.just(1)), min_size=1, max_size=32)
mixed = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=5)


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=25, derandomize=True)
@given(config=models, shape=decodes | mixed, block_size=st.sampled_from([8, 16, 32]), seed=st.integers(0, 999))
def test_float32_equals_torch(name: str, config: ModelConfig, shape: list[tuple[int, int]], block_size: int,
                              seed: int) -> None:  # fmt: skip
    weights = make_weights(config, seed)
    ours = Made.of(config, shape, block_size, "float32", seed)
    theirs = ours.copy()
    found, expected = ours.run(config, weights, "float32", name), theirs.run_torch(config, weights)
    assert relative_error(found, expected) < 2e-5
    # The new tokens' KV is in its slots, and nothing else was touched.
    assert np.abs(ours.kv() - theirs.kv()).max() < 1e-3


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", SETS)
@settings(max_examples=10, derandomize=True)
@given(config=models, shape=decodes | mixed, seed=st.integers(0, 999))
def test_narrow_formats_compute_the_same_model(name: str, form: str, config: ModelConfig,
                                                       shape: list[tuple[int, int]], seed: int) -> None:  # fmt: skip
    weights, dtype = weights_of(config, form, seed)
    ours = Made.of(config, shape, 16, "bfloat16", seed)
    wide = Made.of(config, shape, 16, "float32", seed)
    expected = wide.run_torch(config, rounded(weights, dtype))
    assert relative_error(ours.run(config, weights, dtype, name), expected) < 0.1


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("num_rows", [32, 5])
@pytest.mark.parametrize("name", SETS)
def test_narrow_formats_lose_no_more_than_bfloat16_numbers_do(name: str, num_rows: int, form: str) -> None:
    """Over many rows, where no unlucky one counts for much; and over few, which are multiplied in another way."""
    config = make_config(hidden_size=192, inner=320, bias=True)
    weights, dtype = weights_of(config, form)
    assert {m.format for m in pack(config, weights, dtype).matrices()} == (
        {"int8", "int4"} if form == "int4" else {dtype}
    )
    shape = [(320 // num_rows * n, 1) for n in range(num_rows)]
    ours, wide = (Made.of(config, shape, 16, kv, 0) for kv in ("bfloat16", "float32"))
    expected = wide.run_torch(config, rounded(weights, dtype))
    assert relative_error(ours.run(config, weights, dtype, name), expected) < 0.012


@pytest.mark.parametrize("name", SETS)
def test_weights_of_any_size(name: str) -> None:
    """Rows of the head from large to what float16 has only without a leading one, and what it has not at all."""
    config = make_config(hidden_size=96, tied=False)
    weights = make_weights(config)
    sizes = 2.0 ** (6 - torch.arange(config.vocab_size) % 32)
    signs = torch.tensor([1.0, -1.0, 0.0]).repeat(config.vocab_size)[: config.vocab_size]
    weights = replace(weights, head=(weights.head + 3 * signs[:, None]) * sizes[:, None])
    made = Made.of(config, [(3, 9), (70, 1)], 16, "bfloat16", 0)
    wide = Made.of(config, [(3, 9), (70, 1)], 16, "float32", 0)
    expected = wide.run_torch(config, rounded(weights, "int8"))
    found = made.run(config, weights, "int8", name)
    assert relative_error(found / sizes.numpy(), expected / sizes.numpy()) < 0.03


def on_steps(count: int, step: float, least: float) -> torch.Tensor:
    """[64, 64]: each group holds the first of count values, the last, and any others."""
    values = torch.randint(0, count, (64, 2, 32), generator=torch.Generator().manual_seed(count))
    values[..., 5], values[..., 20] = 0, count - 1
    return (values * step + least).view(64, 64)


@pytest.mark.parametrize(
    "weight",
    [
        *(on_steps(count, 0.0625, -0.3125) for count in (2, 3, 15, 16, 17, 31, 100, 127, 128)),
        on_steps(16, 0.0625, 5.0),
        on_steps(16, 0.0625, -13.0),
        on_steps(16, 2.0**-14 * 1.5, -(2.0**-15) * 1.5),
        on_steps(16, 0.0625, -0.0625 * (7 + 5 / 128)),
        *(on_steps(count, 0.0625, -0.0625 * (count // 2)) for count in (129, 200, 254, 255, 256)),
        torch.zeros(64, 64),
        torch.full((64, 64), 0.75),
        torch.full((64, 64), -3.0),
        on_steps(16, 0.0625, 1.5)[:, :40],
        on_steps(16, 0.0625, -0.5)[:7, :33],
    ],
)  # fmt: skip
def test_int8_meets_weights_that_were_quantized(weight: torch.Tensor) -> None:
    """Where zero is a part of a step, or any whole number of them, away from one."""
    assert torch.equal(int8_weights(weight), weight)


@settings(max_examples=100, derandomize=True)
@given(
    count=st.integers(2, 128),
    size=st.floats(1e-2, 1e2),
    offset=st.floats(-1, 1),
    inputs=st.sampled_from([1, 32, 50, 96]),
    seed=st.integers(0, 999),
)
def test_int8_meets_steps_wherever_zero_is(count: int, size: float, offset: float, inputs: int, seed: int) -> None:
    """Their size is rounded, by up to 2^-11, and where they begin, by as much; weights are in no other way."""
    values = torch.randint(0, count, (32, inputs), generator=torch.Generator().manual_seed(seed)) / count
    weight = (values + offset - 0.5) * size
    for found, group in zip(int8_weights(weight).split(32, 1), weight.split(32, 1), strict=True):
        assert ((found - group).abs().amax(1) <= reach(group) * 2.0**-10 + 2.0**-24).all()  # which is the least float16


@settings(max_examples=50, derandomize=True)
@given(count=st.integers(2, 16), size=st.floats(1e-2, 1e2), zero=st.floats(0, 1), seed=st.integers(0, 999))
def test_sixteen_steps_are_met_within_a_256th(count: int, size: float, zero: float, seed: int) -> None:
    """In 4 bits, zero among them."""
    step = float(torch.tensor(size).half())
    weight = on_steps(count, 1.0, 0.0) - zero * (count - 1)
    config = make_config(vocab_size=64, hidden_size=64, tied=False)
    packed = pack(config, replace(make_weights(config), head=weight * step), "int8").head
    assert packed.format == "int4"
    assert (unpacked(packed)[:64] / step - weight).abs().max() <= 1 / 256 + 1e-5


@settings(max_examples=50, derandomize=True)
@given(size=st.floats(1e-2, 1e2), offset=st.floats(-1, 1), cut=st.integers(1, 96), seed=st.integers(0, 999))
def test_int8_meets_others_within_half_a_step(size: float, offset: float, cut: int, seed: int) -> None:
    """And where they begin within a 16th."""
    weight = (torch.rand(40, cut, generator=torch.Generator().manual_seed(seed)) + offset - 0.5) * size
    for found, group in zip(int8_weights(weight).split(32, 1), weight.split(32, 1), strict=True):
        steps = reach(group) / 255
        assert ((found - group).abs().amax(1) <= steps * (1 / 2 + 1 / 16) + reach(group) * 2.0**-11).all()


def reach(group: torch.Tensor) -> torch.Tensor:
    """How far weights are from each other, or from zero, where that is more: [outputs]."""
    return torch.maximum(group.amax(1) - group.amin(1), group.abs().amax(1))


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", SETS)
def test_a_row_does_not_depend_on_its_company(name: str, form: str) -> None:
    """To the last bit: alone, among others, in chunks, with any number of threads."""
    config = make_config(window=290)
    weights, dtype = weights_of(config, form)
    prompt = np.random.default_rng(1).integers(0, config.vocab_size, 600).tolist()
    answers = []
    for chunk, threads, crowd in ((600, 1, 0), (600, 3, 2), (600, 17, 1), (7, 2, 0), (64, 1, 5), (1, 2, 1)):
        paged = PagedModel(config, weights, num_blocks=600, dtype=dtype, seed=chunk)
        packed = pack(config, weights, dtype)
        paged.runner = CompiledRunner(
            config, packed, paged.layout, memoryview(paged.arena), 600, threads, instruction_set=name
        )
        others = [Entry([5] * (3 + n), 0, paged.table(3 + n), GREEDY) for n in range(crowd)]
        table = paged.table(len(prompt))
        for start in range(0, len(prompt), chunk):
            found = paged.logits([*others, Entry(prompt[start : start + chunk], start, table, GREEDY)])
        answers.append(found[-1])
    for answer in answers[1:]:
        assert np.array_equal(answer, answers[0])


@pytest.mark.parametrize("name", SETS)
def test_places_of_drafts_have_the_logits_of_single_steps(name: str) -> None:
    """In a step whose rows fill several tiles of attention, of some of which no token is drawn, of others from one row."""
    config = make_config()
    prompt = np.random.default_rng(2).integers(0, config.vocab_size, 150).tolist()
    found = []
    for num_drafts in (39, 0, None):
        paged = PagedModel(config, make_weights(config), num_blocks=60, dtype="int8", seed=1)
        paged.runner = CompiledRunner(
            config, pack(config, make_weights(config), "int8"), paged.layout, memoryview(paged.arena), 60, 2,
            instruction_set=name,
        )  # fmt: skip
        table = paged.table(len(prompt))
        other = Entry([5] * 9, 0, paged.table(9), None)
        assert len(paged.logits([other, Entry(prompt[:70], 0, table, None)])) == 0
        if num_drafts is not None:
            found.append(paged.logits([Entry(prompt[70:], 70, table, GREEDY, num_drafts=num_drafts), other]))
        else:
            steps = [Entry([token], 70 + n, table, GREEDY) for n, token in enumerate(prompt[70:])]
            found.append(np.concatenate([paged.logits([step]) for step in steps][40:]))
    drafts, last, alone = found
    assert np.array_equal(drafts, alone)
    assert np.array_equal(last, alone[-1:])


def test_a_long_step_is_not_said_to_end_soon(smollm2: ModelFiles, smollm2_weights: Weights) -> None:
    """What comes after it is planned late, so that it has in it who came meanwhile."""
    config = smollm2.config
    paged = PagedModel(config, smollm2_weights, num_blocks=40, dtype="int8", seed=1)
    packed = pack(config, smollm2_weights, "int8")
    runner = CompiledRunner(config, packed, paged.layout, memoryview(paged.arena), 40, 1)
    runner.warm_up()
    step = runner.start(build_batch([Entry([5] * 600, 0, paged.table(600), GREEDY)], paged.layout.block_size))
    step.wait_nearly()
    nearly_s = time.monotonic()
    outcome = step.result()
    assert (outcome.began_s + outcome.ended_s) / 2 < nearly_s < outcome.ended_s


def test_blocks_that_no_token_sees_are_not_read() -> None:
    config = make_config(window=16)
    weights = make_weights(config)
    made = Made.of(config, [(200, 1)], 8, "bfloat16", 3)
    before = made.copy().run(config, weights, "bfloat16", SETS[0])
    block_nbytes = made.layout.block_nbytes
    for block in made.batch.kv_indices[:22]:  # of 26: tokens 0..175, and 185 is the first that is seen
        made.arena[block * block_nbytes : (block + 1) * block_nbytes] = b"\xff" * block_nbytes
    assert np.array_equal(made.run(config, weights, "bfloat16", SETS[0]), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [lambda w: w.layers[0].attention_norm, lambda w: w.layers[0].output])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_is_not_finite_shows(dtype: str, part: Callable[[Weights], torch.Tensor], value: float) -> None:
    config = make_config()
    weights = make_weights(config)
    part(weights).view(-1)[77 % part(weights).numel()] = value
    made = Made.of(config, [(5, 1)], 8, "float32" if dtype == "float32" else "bfloat16", 0)
    for name in SETS:
        assert np.isnan(made.copy().run(config, weights, dtype, name)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": np.array([101])},
        {"token_ids": np.array([-1])},
        {"slots": np.array([10**6])},
        {"kv_indices": np.array([0, 99], dtype=np.int32)},
        {"kv_indices": np.array([0, -1], dtype=np.int32)},
        {"kv_last_page_len": np.array([7], dtype=np.int32)},
        {"positions": np.array([700])},
        {"positions": np.array([-1])},
        {"samples": (Sample(9, GREEDY, 9, None),)},
        {"samples": (Sample(-1, GREEDY, 9, None),)},
        {"samples": (Sample(8, GREEDY, 9, None),) * 10},
    ],
)
def test_wrong_indices_do_not_reach_the_kernels(change: dict[str, Any]) -> None:
    config = make_config()
    made = Made.of(config, [(9, 1)], 8, "float32", 0)
    with pytest.raises(ValueError, match="that there is not"):
        replace(made, batch=replace(made.batch, **change)).run(config, make_weights(config), "float32", SETS[0])


def test_idle_threads_sleep_and_end_with_their_model() -> None:
    config = make_config()
    made = Made.of(config, [(40, 1)], 16, "float32", 0)
    before = _threads()
    runner = CompiledRunner(
        config, pack(config, make_weights(config), "float32"), made.layout, memoryview(made.arena), made.num_blocks, 4
    )
    runner.logits(made.batch)
    assert len(_threads() - before) == 4, "four that compute, and none of them is the caller's"
    time.sleep(0.05)
    began = os.times()
    time.sleep(0.5)
    ended = os.times()
    assert (ended.user + ended.system) - (began.user + began.system) < 0.1
    del runner
    gc.collect()
    assert _threads() <= before


def test_steps_of_two_models_run_beside_each_other() -> None:
    config = make_config()
    weights = make_weights(config)
    made = Made.of(config, [(300, 1), (20, 30)], 16, "float32", 0)
    expected = made.copy().run(config, weights, "float32", SETS[0])
    wrong: list[int] = []

    def work() -> None:
        own = made.copy()
        pool = (own.layout, memoryview(own.arena), own.num_blocks)
        runner = CompiledRunner(config, pack(config, weights, "float32"), *pool, 3)
        wrong.extend(n for n in range(200) if not np.array_equal(runner.logits(own.batch), expected))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    made = Made.of(make_config(), [(0, 1)], 8, "float32", 0)
    with pytest.raises(ValueError, match="this processor has no sse9; it has"):
        made.run(make_config(), make_weights(make_config()), "float32", "sse9")


def test_without_a_compiler_the_reason_says_what_to_do(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(build, "BUILD", tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    load.cache_clear()
    with pytest.raises(KernelsUnavailable, match="apt-get install gcc, then make setup"):
        load()
    load.cache_clear()


def _threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))
