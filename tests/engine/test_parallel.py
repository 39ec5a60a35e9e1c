"""One model on several ranks: the same logits, tokens and KV as on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from services.engine.flashinfer_runner import FlashInferRunner
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig, ModelError
from services.engine.model_files import ModelFiles
from services.engine.parallel.shard import Shard
from services.engine.runner import TorchRunner
from services.engine.sampling_params import Drawn
from services.engine.weights import load_weights
from tests.engine.fake_device import FakeDevice
from tests.engine.paging import PagedModel, relative_error
from tests.engine.test_kernels import make_config
from tests.engine.test_model_families import SIZES, make_model, save
from tests.engine.thread_group import ThreadGroup, on_ranks

WIDE: dict[str, Any] = {
    **SIZES, "vocab_size": 301, "hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32
}  # fmt: skip
MODELS: dict[str, Any] = {
    "tied": lambda: transformers.LlamaConfig(**WIDE, tie_word_embeddings=True),
    "untied": lambda: transformers.LlamaConfig(**WIDE, tie_word_embeddings=False),
    "biased": lambda: transformers.Qwen2Config(**WIDE, tie_word_embeddings=True),
    "windowed": lambda: transformers.MistralConfig(**WIDE, sliding_window=21, tie_word_embeddings=False),
}
NUM_BLOCKS, BLOCK_SIZE = 64, 8


class ShardedModel(PagedModel):
    """One rank, over a pool of its own heads."""

    def __init__(self, config: ModelConfig, path: Path, shard: Shard, group: ThreadGroup, *,
                 device: FakeDevice | None = None) -> None:  # fmt: skip
        own = shard.config(config)
        weights = load_weights(config, path, "float32", shard=shard)
        super().__init__(own, weights, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, kernels=False)
        if device is None:
            self.runner = TorchRunner(own, weights, self.layout, memoryview(self.arena), NUM_BLOCKS, 1, group)
        else:
            self.runner = FlashInferRunner(
                own, weights, self.layout, self.kv, device.kernels, device,
                max_running=6, returns_early=False, group=group,
            )  # type: ignore[assignment]  # fmt: skip
            self.runner.warm_up()

    @property
    def kv(self) -> torch.Tensor:
        return torch.frombuffer(self.arena, dtype=torch.float32).view(NUM_BLOCKS, *self.layout.block_shape)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    path = tmp_path_factory.mktemp(request.param)
    return save(make_model(MODELS[request.param]()), path), path


def texts(vocab_size: int) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(0, vocab_size, size).tolist() for size in (37, 1, 12, 50)]


def whole(model: tuple[ModelConfig, Path]) -> PagedModel:
    config, path = model
    weights = load_weights(config, path, "float32")
    return PagedModel(config, weights, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, kernels=False)


@pytest.mark.parametrize("size", [2, 3])
def test_logits_and_kv_are_those_of_one_rank(model: tuple[ModelConfig, Path], size: int) -> None:
    config, path = model
    ids = texts(config.vocab_size)[0]
    one = whole(model)
    expected = one.prompt_logits(ids, chunk=16)
    kv = torch.frombuffer(one.arena, dtype=torch.float32).view(NUM_BLOCKS, *one.layout.block_shape)

    def act(rank: int, group: ThreadGroup) -> tuple[Any, torch.Tensor, int]:
        sharded = ShardedModel(config, path, Shard.of(config, rank, size), group)
        return sharded.prompt_logits(ids, chunk=16), sharded.kv, group.num_sums

    found = on_ranks(size, act)
    assert relative_error(found[0][0], expected) < 1e-5
    # Slots that hold nothing are NaN on both.
    torch.testing.assert_close(
        torch.cat([part for _, part, _ in found], dim=4), kv, rtol=1e-4, atol=1e-4, equal_nan=True
    )
    assert not kv.isnan().all()
    assert {num_sums for _, _, num_sums in found} == {2 * config.num_layers * 3}, "two a layer and step"


@pytest.mark.parametrize("size", [2, 3])
def test_tokens_are_those_of_one_rank(model: tuple[ModelConfig, Path], size: int) -> None:
    config, path = model
    prompts = texts(config.vocab_size)
    expected = whole(model).greedy(prompts, num_tokens=12, chunk=7)
    found = on_ranks(size, lambda rank, group: _follow_greedy(config, path, rank, size, group, prompts, None))
    assert found[0] == expected


@pytest.mark.parametrize("size", [2, 3])
def test_flashinfers_calls_take_a_shard(model: tuple[ModelConfig, Path], size: int) -> None:
    config, path = model
    prompts = texts(config.vocab_size)
    expected = whole(model).greedy(prompts, num_tokens=12, chunk=7)
    found = on_ranks(size, lambda rank, group: _follow_greedy(config, path, rank, size, group, prompts, FakeDevice()))
    assert found[0] == expected


def _follow_greedy(config: ModelConfig, path: Path, rank: int, size: int, group: ThreadGroup,
                   prompts: list[list[int]], device: FakeDevice | None) -> list[list[int]]:  # fmt: skip
    """Every rank knows the tokens that were drawn, as if the first one had told it the next step."""
    sharded = ShardedModel(config, path, Shard.of(config, rank, size), group, device=device)
    told = _Told(sharded.runner, group, leads=rank == 0)
    sharded.runner = told  # type: ignore[assignment]
    return sharded.greedy(prompts, num_tokens=12, chunk=7)


class _Told:
    """Gives every rank the first one's draws."""

    def __init__(self, runner: Any, group: ThreadGroup, *, leads: bool) -> None:
        self._runner, self._group, self._leads = runner, group, leads

    def run(self, batch: Any) -> Any:
        if self._leads:
            drawn = self._runner.run(batch)
            tokens = torch.tensor([[token.token_id] for token in drawn]).view(-1, 1)
        else:
            self._runner.follow(batch)
            tokens = torch.zeros((len(batch.samples), 1), dtype=torch.long)
        return [Drawn(int(token)) for token in self._group.sum(tokens).flatten()]


def test_the_real_model_on_two_ranks_of_unequal_heads(smollm2: ModelFiles) -> None:
    """From GGUF: 3 KV heads, 2 and 1 of them."""
    config, path = smollm2.config, smollm2.path
    shards = [Shard.of(config, rank, 2) for rank in range(2)]
    assert [len(shard.kv_heads) for shard in shards] == [2, 1]
    ids = smollm2.tokenizer.encode("The capital of France is Paris. The capital of Italy is", add_special=True)
    one = PagedModel(
        config, load_weights(config, path, "float32"), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, kernels=False
    )
    expected = one.prompt_logits(ids)
    found = on_ranks(2, lambda rank, group: ShardedModel(config, path, shards[rank], group).prompt_logits(ids))
    assert relative_error(found[0], expected) < 1e-5


@given(data=st.data())
def test_shards_are_the_model_cut_up(data: st.DataObject) -> None:
    num_kv_heads, sharing = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 8))
    config = make_config(
        num_kv_heads=num_kv_heads, sharing=sharing, inner=data.draw(st.integers(num_kv_heads, 200)),
        vocab_size=data.draw(st.integers(1, 60)),
    )  # fmt: skip
    size = data.draw(st.integers(1, num_kv_heads))
    shards = [Shard.of(config, rank, size) for rank in range(size)]
    for name, count in (("heads", config.num_heads), ("kv_heads", num_kv_heads), ("inner", config.intermediate_size),
                        ("tokens", config.vocab_size)):  # fmt: skip
        assert [i for shard in shards for i in getattr(shard, name)] == list(range(count)), name
    for shard in shards:
        assert {head // sharing for head in shard.heads} == set(shard.kv_heads), "heads go with their KV heads"
        assert shard.kv_heads
        assert shard.inner
        assert len(shard.tokens) <= shard.num_columns
        shard.config(config)  # is one
    full = [shard for shard in shards if len(shard.tokens) == shard.num_columns]
    assert shards[: len(full)] == full, "only the last give fewer"


def test_more_ranks_than_kv_heads_are_refused() -> None:
    with pytest.raises(ModelError, match="has 2 KV heads, which 3 ranks cannot share out; use --tp 2 or less"):
        Shard.of(make_config(num_kv_heads=2), 0, 3)


def test_a_layout_says_how_it_is_cut() -> None:
    one = KvLayout("r", "float32", 16, 2, 3, 64)
    two = replace(one, tp=2)
    assert one.content_fingerprint == two.content_fingerprint
    assert one.fingerprint != two.fingerprint
    assert [two.of_rank(rank).num_kv_heads for rank in range(2)] == [2, 1]
    assert sum(two.of_rank(rank).block_nbytes for rank in range(2)) == two.block_nbytes == one.block_nbytes
    with pytest.raises(ValueError, match="cannot be shared out to 4 ranks"):
        replace(one, tp=4)
