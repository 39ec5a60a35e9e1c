"""What a model costs a planner: weights, KV and FLOPs, from its config.json.  Pure but for the reading of files.

FLOPs are those of matrix products, two to a multiplication with addition, as in services/engine/phases.py, which counts the
models that kvferry serves; here are mixtures of experts and multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)
too: prompts attend with keys and values unfolded, decoding with the projections absorbed into queries and outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvferry.errors import InvalidRequestError

KNOWN: Mapping[str, Mapping[str, Any]] = json.loads(Path(__file__).with_name("models.json").read_text())
# Of one weight.  fp8: scales of 128 x 128 blocks are left out; int8 as services/engine packs what has more than 16 steps.
WEIGHT_NBYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.125}
KV_NBYTES = {"bf16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """``num_dense`` weights multiply every token, ``num_head`` every place at which a token is drawn; of ``num_routed`` in
    the experts of all layers a token meets ``experts_per_token / num_experts``.  ``num_embedding`` are looked up.
    ``kv_token_numbers``: of one token in all layers.  A pair of tokens takes ``prompt_pair_flops`` in a prompt and
    ``decode_pair_flops`` in decoding.  ``num_kv_shards``: tensor parallelism beyond it copies KV; None: it never does."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_dense: int
    num_head: int
    num_embedding: int
    num_routed: int
    num_experts: int
    experts_per_token: int
    kv_token_numbers: int
    prompt_pair_flops: float
    decode_pair_flops: float
    num_kv_shards: int | None
    weight_dtype: str

    @property
    def num_weights(self) -> int:
        return self.num_dense + self.num_head + self.num_embedding + self.num_routed

    @property
    def num_active(self) -> float:
        """That multiply every token, without the head."""
        return self.num_dense + self.num_routed * self.expert_share

    @property
    def expert_share(self) -> float:
        """Of the experts of a layer that one token meets."""
        return self.experts_per_token / self.num_experts if self.num_experts else 0.0

    @property
    def expert_rate(self) -> float:
        """So that 1 - exp(-rate * tokens) of the experts are touched, if each token picks its own at random."""
        return -math.log1p(-self.expert_share) if 0 < self.expert_share < 1 else (700.0 if self.num_experts else 0.0)

    def weights_nbytes(self, dtype: str) -> float:
        return self.num_weights * WEIGHT_NBYTES[dtype]

    def kv_token_nbytes(self, kv_dtype: str) -> int:
        return self.kv_token_numbers * KV_NBYTES[kv_dtype]


def find_model(name: str) -> ModelShape:
    """One of ``KNOWN``, as it is or as ``organisation/Name-Instruct``, or the path of a config.json or of a folder with
    one.  Raises InvalidRequestError."""
    known = name.rpartition("/")[2].lower().removesuffix("-instruct")
    if known in KNOWN:
        return shape_of(known, KNOWN[known])
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise InvalidRequestError(f"{name!r} is neither a config.json nor one of {', '.join(KNOWN)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidRequestError(f"{path} holds no JSON object; give a model's config.json")
    return shape_of(path.parent.name or str(path), config)


def shape_of(name: str, config: Mapping[str, Any]) -> ModelShape:
    """From the keys of Hugging Face's config.json.  Raises InvalidRequestError, which names the key."""
    read = _Reader(name, config)
    hidden, layers, heads = read("hidden_size"), read("num_hidden_layers"), read("num_attention_heads")
    vocab, inner = read("vocab_size"), read("intermediate_size")
    kv_shards: int | None
    if config.get("kv_lora_rank"):
        latent, rope, nope, value = (
            read(key) for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        )
        query = read("q_lora_rank", None)
        queries = heads * (nope + rope)
        attention = hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
        attention += hidden * query + query * queries if query else hidden * queries
        kv_numbers, kv_shards = layers * (latent + rope), None
        prompt_pair, decode_pair = 2.0 * heads * (nope + rope + value), 2.0 * heads * (2 * latent + rope)
    else:
        kv_heads = read("num_key_value_heads", heads)
        dim = read("head_dim", hidden // heads)
        attention = hidden * dim * (2 * heads + 2 * kv_heads)
        kv_numbers, kv_shards = layers * 2 * kv_heads * dim, kv_heads
        prompt_pair = decode_pair = 4.0 * heads * dim
    experts = next((read(k) for k in ("n_routed_experts", "num_experts", "num_local_experts") if config.get(k)), 0)
    expert = 3 * hidden * read("moe_intermediate_size", inner) if experts else 0
    dense_layers = read("first_k_dense_replace", 0, least=0) if experts else layers
    shared = read("n_shared_experts", 0, least=0) * expert if experts else 0
    sparse_layers = layers - dense_layers
    quantized = (config.get("quantization_config") or {}).get("quant_method")
    return ModelShape(
        name=name, hidden_size=hidden, num_layers=layers, num_heads=heads,
        num_dense=layers * attention + dense_layers * 3 * hidden * inner + sparse_layers * (shared + hidden * experts),
        num_head=hidden * vocab,
        num_embedding=0 if config.get("tie_word_embeddings") else hidden * vocab,
        num_routed=sparse_layers * experts * expert,
        num_experts=experts,
        experts_per_token=read("num_experts_per_tok") if experts else 0,
        kv_token_numbers=kv_numbers,
        prompt_pair_flops=layers * prompt_pair, decode_pair_flops=layers * decode_pair,
        num_kv_shards=kv_shards,
        weight_dtype="fp8" if quantized == "fp8" else "bf16",
    )  # fmt: skip


_REQUIRED = object()


class _Reader:
    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._name, self._config = name, config

    def __call__(self, key: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
        """An integer; a null is as if it were not there."""
        value = self._config.get(key)
        if value is None:
            if default is _REQUIRED:
                raise InvalidRequestError(f"the config of {self._name!r} has no {key}; a plan needs it")
            return default
        if not isinstance(value, int) or value < least:
            raise InvalidRequestError(
                f"the config of {self._name!r} says {key} = {value!r}; it must be {least} or more"
            )
        return value
