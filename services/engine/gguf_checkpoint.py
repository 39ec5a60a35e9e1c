"""What a GGUF file says of its model.  No torch."""

from __future__ import annotations

from services.engine.gguf_file import GgufFile
from services.engine.model_config import FrequencyFactors, LinearScaling, ModelConfig, ModelError, RopeScaling

_ARCHITECTURES = ("llama", "qwen2")


def read_config(file: GgufFile, name: str) -> ModelConfig:
    """Raises ModelError for what kvferry cannot compute exactly."""
    arch = file.get("general.architecture", str)
    if arch not in _ARCHITECTURES:
        raise ModelError(
            f"the architecture {arch!r} of {file.path} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    if file.get(f"{arch}.expert_count", int, 0):
        raise ModelError(f"the model {file.path} is a mixture of experts, which is not supported; use a dense one")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"the model file {file.path} holds no token embeddings; it is incomplete")
    num_heads = file.get(f"{arch}.attention.head_count", int)
    hidden_size = file.get(f"{arch}.embedding_length", int)
    head_dim = file.get(f"{arch}.attention.key_length", int, hidden_size // max(num_heads, 1))
    if file.get(f"{arch}.rope.dimension_count", int, head_dim) != head_dim:
        raise ModelError(f"the model {file.path} rotates a part of each head only, which is not supported")
    eos = (file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    return ModelConfig(
        name=name,
        revision=file.fingerprint,
        architecture=arch,
        hidden_size=hidden_size,
        num_layers=file.get(f"{arch}.block_count", int),
        num_heads=num_heads,
        num_kv_heads=file.get(f"{arch}.attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        intermediate_size=file.get(f"{arch}.feed_forward_length", int),
        vocab_size=embedding.shape[0],
        context_length=file.get(f"{arch}.context_length", int),
        norm_eps=file.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        rope_theta=file.get(f"{arch}.rope.freq_base", float, 10000.0),
        rope_scaling=_rope_scaling(file, arch),
        sliding_window=file.get(f"{arch}.attention.sliding_window", int, 0) or None,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        tied_embeddings="output.weight" not in file.tensors,
        bos_token_id=bos if isinstance(bos, int) else None,
        eos_token_ids=tuple(sorted({token_id for token_id in eos if isinstance(token_id, int)})),
    )


def _rope_scaling(file: GgufFile, arch: str) -> RopeScaling | None:
    if "rope_freqs.weight" in file.tensors:
        return FrequencyFactors(file.floats("rope_freqs.weight"))
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    factor = file.get(f"{arch}.rope.scaling.factor", float, 1.0)
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return LinearScaling(factor)
    raise ModelError(f"the rope scaling {kind!r} of {file.path} is not supported; supported are linear and Llama 3's")
