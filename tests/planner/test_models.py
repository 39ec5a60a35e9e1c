"""Model shapes: as their makers count them, and as the engine counts its own steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvferry.errors import InvalidRequestError
from services.engine.phases import ModelShape as EngineShape
from services.engine.phases import Piece, demand_of
from services.planner.models import KNOWN, find_model, shape_of

# Billions of weights, and of those that a token meets, head included, where the model card says so; bytes of KV a token.
CARDS = {
    "smollm2-135m": (0.1345, 0.1345, 23040),
    "qwen2.5-7b": (7.61, None, 57344),
    "llama-3.1-8b": (8.03, None, 131072),
    "llama-3.1-70b": (70.6, None, 327680),
    "qwen2.5-72b": (72.7, None, 327680),
    "deepseek-v3": (671.0, 37.0, 70272),
}


@pytest.mark.parametrize("name", KNOWN)
def test_as_its_card_says(name: str) -> None:
    weights, active, kv_nbytes = CARDS[name]
    model = find_model(name)
    assert model.num_weights / 1e9 == pytest.approx(weights, rel=0.005)
    assert model.kv_token_nbytes("bf16") == kv_nbytes
    if active is not None:
        # The card counts the embedding where it is not looked up only.
        assert (model.num_active + model.num_head) / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.1-8b"])
def test_flops_as_the_engine_counts_them(name: str) -> None:
    config, model = KNOWN[name], find_model(name)
    heads = config["num_attention_heads"]
    engine = EngineShape(
        config["num_hidden_layers"], config["hidden_size"], heads, config["num_key_value_heads"],
        config["hidden_size"] // heads, config["intermediate_size"], config["vocab_size"], None, 2.0, 2.0, 2,
    )  # fmt: skip
    chunk = demand_of(engine, [Piece(256, 1024, 0)])
    pairs = 256 * 768 + 256 * 257 // 2
    assert 2 * 256 * model.num_active + pairs * model.prompt_pair_flops == pytest.approx(chunk.flops)
    batch = demand_of(engine, [Piece(1, 500, 1)] * 8)
    one = 2 * (model.num_active + model.num_head) + 500 * model.decode_pair_flops
    assert 8 * one == pytest.approx(batch.flops)
    assert model.kv_token_nbytes("bf16") == engine.kv_token_nbytes


def test_a_config_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["llama-3.1-8b"]))
    found = find_model(str(tmp_path))
    assert found.num_weights == find_model("llama-3.1-8b").num_weights
    assert find_model(str(tmp_path / "config.json")) == found


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"hidden_size": 64}, "num_hidden_layers"),
        ({**KNOWN["llama-3.1-8b"], "vocab_size": 0}, "vocab_size = 0"),
        ({**KNOWN["llama-3.1-8b"], "hidden_size": "4096"}, "hidden_size = '4096'"),
        ({**KNOWN["deepseek-v3"], "num_experts_per_tok": None}, "num_experts_per_tok"),
    ],
)
def test_what_is_missing_or_wrong_is_named(config: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        shape_of("mine", config)


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(InvalidRequestError, match="qwen2"):
        find_model("llama-9")
