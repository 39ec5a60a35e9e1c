"""Each family of models, tiny and random, from a Hugging Face directory and (where its rows differ) from GGUF."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from services.engine import gguf_checkpoint, hf_checkpoint
from services.engine.gguf_file import GgufFile
from services.engine.model_config import FrequencyFactors, Llama3Scaling, ModelConfig, ModelError
from services.engine.rope import inverse_frequencies
from services.engine.weights import load_weights
from tests.engine.paging import PagedModel, relative_error

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama2": lambda: transformers.LlamaConfig(
        **{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=False, rms_norm_eps=1e-5
    ),
    "llama2-linear": lambda: transformers.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "llama3": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=21, tie_word_embeddings=False),
    "mistral-no-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
}
PROMPT = np.random.default_rng(3).integers(0, 300, 100).tolist()


def make_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for every part to show, biases and norms included
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(model: Any, directory: Path, **options: Any) -> ModelConfig:
    model.save_pretrained(directory, **options)
    return hf_checkpoint.read_config(directory, "tiny")


def reference_logits(model: Any, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids])).logits[0, -1].numpy())


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_equal_the_reference(family: str, kernels: bool, tmp_path: Path) -> None:
    model = make_model(FAMILIES[family]())
    config = save(model, tmp_path, max_shard_size="100KB" if family == "llama2" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (family == "llama2")
    weights = load_weights(config, tmp_path, "float32")
    paged = PagedModel(config, weights, num_blocks=96, block_size=8, kernels=kernels)
    expected = reference_logits(model, PROMPT)
    assert relative_error(paged.prompt_logits(PROMPT), expected) < 1e-5
    assert relative_error(paged.prompt_logits(PROMPT, chunk=7), expected) < 1e-5
    for prompt, answer in zip((PROMPT, PROMPT[:30]), paged.greedy([PROMPT, PROMPT[:30]], 6, chunk=17), strict=True):
        known = list(prompt)
        for token in answer:
            assert token == int(reference_logits(model, known).argmax())
            known.append(token)


def test_the_sliding_window_is_honoured(tmp_path: Path) -> None:
    config = save(make_model(FAMILIES["mistral"]()), tmp_path)
    assert config.sliding_window == 21
    weights = load_weights(config, tmp_path, "float32")
    windowed = PagedModel(config, weights, num_blocks=32, block_size=8).prompt_logits(PROMPT)
    whole = PagedModel(replace(config, sliding_window=None), weights, num_blocks=32, block_size=8).prompt_logits(PROMPT)
    assert relative_error(windowed, whole) > 1e-3


def test_both_spellings_of_rope_scaling_are_read(tmp_path: Path) -> None:
    import json

    config = save(make_model(FAMILIES["llama3"]()), tmp_path)
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)
    raw = json.loads((tmp_path / "config.json").read_text())
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": scaling}))
    assert hf_checkpoint.read_config(tmp_path, "tiny").rope_scaling == config.rope_scaling


def test_frequency_factors_divide(tmp_path: Path) -> None:
    config = save(make_model(FAMILIES["llama2"]()), tmp_path)
    factors = tuple(float(n) for n in range(1, config.head_dim // 2 + 1))
    scaled = inverse_frequencies(replace(config, rope_scaling=FrequencyFactors(factors)))
    assert torch.allclose(scaled * torch.tensor(factors), inverse_frequencies(config))


def write_gguf(model: Any, path: Path, architecture: str) -> None:
    """As llama.cpp's converter does: its llama files have query and key rows reordered for rotation by neighbours."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(32)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_eos_token_id(7)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("family", "architecture"), [("llama2", "llama"), ("qwen2", "qwen2")])
def test_gguf_gives_the_same_logits(family: str, architecture: str, tmp_path: Path) -> None:
    model = make_model(FAMILIES[family]())
    path = tmp_path / "tiny.gguf"
    write_gguf(model, path, architecture)
    config = gguf_checkpoint.read_config(GgufFile(path), "tiny")
    assert (config.qkv_bias, config.tied_embeddings, config.eos_token_ids) == (
        family == "qwen2",
        family == "qwen2",
        (7,),
    )
    paged = PagedModel(config, load_weights(config, path, "float32"), num_blocks=16, block_size=8)
    assert relative_error(paged.prompt_logits(PROMPT), reference_logits(model, PROMPT)) < 1e-5


def test_a_truncated_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(make_model(FAMILIES["qwen2"]()), path, "qwen2")
    config = gguf_checkpoint.read_config(GgufFile(path), "tiny")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="download it again"):
        load_weights(config, path, "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "biases"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"hidden_size": None}, "misstates"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    import json

    save(make_model(FAMILIES["llama2-linear"]()), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ModelError, match=message):
        hf_checkpoint.read_config(tmp_path, "tiny")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    config = save(make_model(FAMILIES["qwen2"]()), tmp_path)
    with pytest.raises(ModelError, match="do not belong"):
        load_weights(replace(config, intermediate_size=100), tmp_path, "float32")
    with pytest.raises(ModelError, match=r"lack the tensor model\.layers\.3"):
        load_weights(replace(config, num_layers=4), tmp_path, "float32")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save(make_model(FAMILIES["qwen2"]()), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        hf_checkpoint.read_config(tmp_path, "tiny")


def test_the_revision_follows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    model = make_model(FAMILIES["qwen2"]())
    first, copy = save(model, tmp_path / "a"), save(model, tmp_path / "b")
    assert first.revision == copy.revision
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert save(model, tmp_path / "c").revision != first.revision
