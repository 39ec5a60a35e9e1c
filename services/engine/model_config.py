"""What a model is, apart from its weights and its words.  No torch: the gateway reads this too."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry import errors


class ModelError(errors.InvalidRequestError):
    """The model cannot be served from what was given: missing, damaged, or of a kind that is not supported.  The message
    is one sentence that says which file and what to do."""

    default_reason = "MODEL"


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All rotary frequencies divided by ``factor`` (positions interpolated)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's: wavelengths beyond ``original_context_length / low_freq_factor`` are stretched by ``factor``, those
    within ``original_context_length / high_freq_factor`` stay, and those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclass(frozen=True, slots=True)
class FrequencyFactors:
    """One divisor for each of the ``head_dim / 2`` frequencies, as GGUF files store Llama 3.1's scaling."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | FrequencyFactors


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family: RMS norm, rotary positions on half-split heads, grouped queries, SiLU-gated MLP.

    ``revision`` is the fingerprint of config, tokenizer and weights: equal on every machine that has the same files.
    ``context_length`` bounds prompt and answer together.  ``sliding_window``: a token attends to that many positions,
    itself included; None is all of them.  ``qkv_bias``: the query, key and value projections add a bias (Qwen 2)."""

    name: str
    revision: str
    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    qkv_bias: bool
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
                      "vocab_size", "context_length"):  # fmt: skip
            if getattr(self, field) <= 0:
                raise ModelError(
                    f"the model {self.name!r} states {field} = {getattr(self, field)}; it must be positive"
                )
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"the model {self.name!r} has {self.num_heads} heads, which {self.num_kv_heads} KV heads cannot share"
            )
        if self.head_dim % 2:
            raise ModelError(
                f"the model {self.name!r} has heads of {self.head_dim} dimensions; rotary needs an even number"
            )
