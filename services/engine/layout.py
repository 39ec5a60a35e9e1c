"""How KV blocks lie in a pool.  No torch: whoever compares fingerprints or sizes a region needs only this."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

_ITEM_NBYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class KvLayout:
    """A pool is ``[block][layer][2: key, value][token][kv_head][head_dim]``, row-major and without padding: one block is
    one contiguous run over all layers, and one layer's view of the pool is FlashInfer's NHD with a wider block stride.
    Bytes may move between two pools only if their fingerprints are equal."""

    model_revision: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_NBYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(sorted(_ITEM_NBYTES))}")
        if min(self.block_size, self.num_layers, self.num_kv_heads, self.head_dim) <= 0:
            raise ValueError(f"every size of a KV layout is positive: {self}")

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def block_nbytes(self) -> int:
        num_items = self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim
        return num_items * _ITEM_NBYTES[self.dtype]

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits, the same in every process for the same layout."""
        described = {
            "order": "block,layer,kv,token,head,dim",
            "model_revision": self.model_revision,
            "dtype": self.dtype,
            "block_size": self.block_size,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
