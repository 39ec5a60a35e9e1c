"""Which part of a model each rank of a tensor-parallel worker has (Megatron-LM, https://arxiv.org/abs/1909.08053).  Pure.

Queries, keys, values, gate and up are cut by outputs, the attention's output and down by inputs, so that a layer needs two
sums over the ranks.  Heads are cut where groups that share a KV head meet; ranks may have unequal numbers of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.engine.layout import share_out
from services.engine.model_config import ModelConfig, ModelError

# Of the MLP: rows that kernels read by 16 bytes.
INNER_UNIT = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank ``rank`` of ``size``: its heads, its part of the MLP's inner numbers, and the tokens whose logits it gives.
    ``num_columns`` is how many logits a rank gives at most; only the last ranks give fewer."""

    rank: int
    size: int
    heads: range
    kv_heads: range
    inner: range
    tokens: range
    num_columns: int

    @classmethod
    def of(cls, config: ModelConfig, rank: int, size: int) -> Shard:
        """Raises ModelError when there are fewer KV heads than ranks."""
        assert 0 <= rank < size
        if size > config.num_kv_heads:
            raise ModelError(
                f"the model {config.name!r} has {config.num_kv_heads} KV heads, which {size} ranks cannot share out; use "
                f"--tp {config.num_kv_heads} or less"
            )
        kv_heads = share_out(config.num_kv_heads, size)[rank]
        group = config.num_heads // config.num_kv_heads
        unit = INNER_UNIT if config.intermediate_size % (INNER_UNIT * size) == 0 else 1
        inner = share_out(config.intermediate_size // unit, size)[rank]
        num_columns = -(-config.vocab_size // size)
        first = min(rank * num_columns, config.vocab_size)
        return cls(
            rank, size,
            heads=range(kv_heads.start * group, kv_heads.stop * group),
            kv_heads=kv_heads,
            inner=range(inner.start * unit, inner.stop * unit),
            tokens=range(first, min(first + num_columns, config.vocab_size)),
            num_columns=num_columns,
        )  # fmt: skip

    @classmethod
    def whole(cls, config: ModelConfig) -> Shard:
        return cls.of(config, 0, 1)

    def config(self, config: ModelConfig) -> ModelConfig:
        """Of the model as this rank computes it.  Hidden size and vocabulary are the whole model's."""
        return replace(
            config,
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.inner),
        )
