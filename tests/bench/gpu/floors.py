"""What a step cannot be faster than, from a model's shape and what the machine was measured to do.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

from services.engine.model_config import ModelConfig

LLAMA_8B = ModelConfig(
    name="llama-3.1-8b", revision="shape", architecture="llama", hidden_size=4096, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, intermediate_size=14336, vocab_size=128256, context_length=131072, norm_eps=1e-5,
    rope_theta=500000.0, rope_scaling=None, sliding_window=None, qkv_bias=False, tied_embeddings=False,
    bos_token_id=None, eos_token_ids=(),
)  # fmt: skip
SMOLLM2_135M = replace(
    LLAMA_8B, name="smollm2-135m", hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    intermediate_size=1536, vocab_size=49152, context_length=8192, rope_theta=100000.0, tied_embeddings=True,
)  # fmt: skip
SHAPES = {config.name: config for config in (SMOLLM2_135M, LLAMA_8B)}
ITEM_NBYTES = 2
BLOCK_SIZE = 16


def tiny(config: ModelConfig) -> ModelConfig:
    """What a CPU computes at once, with as many heads to a KV head, and words enough for the prompts that are asked."""
    return replace(
        config, name=f"{config.name}-tiny", hidden_size=64, num_layers=2,
        num_heads=2 * config.num_heads // config.num_kv_heads, num_kv_heads=2,
        head_dim=32, intermediate_size=96, vocab_size=40960, context_length=1024,
    )  # fmt: skip


def num_matrix_weights(config: ModelConfig) -> int:
    """Of all products of a step, the head's included; the embedding is looked up, not multiplied."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def weights_nbytes(config: ModelConfig) -> int:
    """Of a file, but for the norms."""
    embedding = 0 if config.tied_embeddings else config.vocab_size * config.hidden_size
    return (num_matrix_weights(config) + embedding) * ITEM_NBYTES


def kv_token_nbytes(config: ModelConfig) -> int:
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * ITEM_NBYTES


def decode_nbytes(config: ModelConfig, batch: int, context: float) -> float:
    """Every weight once, and every sequence's KV once."""
    return num_matrix_weights(config) * ITEM_NBYTES + batch * context * kv_token_nbytes(config)


def fitting(
    config: ModelConfig, batches: Iterable[int], contexts: Iterable[int], nbytes: float
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(batch, context) whose weights and KV are fewer bytes, and those that are left out."""
    pairs = list(product(batches, contexts))
    beyond = [pair for pair in pairs if decode_nbytes(config, *pair) >= nbytes]
    return [pair for pair in pairs if pair not in beyond], beyond


def prefill_flops(config: ModelConfig, num_tokens: int) -> int:
    """Products with the weights, of the head for one token, and causal attention's two."""
    head = config.vocab_size * config.hidden_size
    products = 2 * (num_matrix_weights(config) - head) * num_tokens + 2 * head
    attention = 2 * 2 * config.num_layers * config.num_heads * config.head_dim * num_tokens * (num_tokens + 1) // 2
    return products + attention
