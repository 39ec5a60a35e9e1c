"""How KV blocks lie in a pool.  No torch: whoever compares fingerprints or sizes a region needs only this."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KvLayout:
    """A pool is ``[block][layer][2: key, value][token][kv_head][head_dim]``, row-major and without padding: one block is
    one contiguous run over all layers, and one layer's view of the pool is FlashInfer's NHD with a wider block stride.
    Blocks move as they are between pools of equal ``fingerprint``; where only ``content_fingerprint`` is equal, the pools
    hold the same numbers in blocks of another size or type or cut by heads in another way, and a writer can convert.

    Of a worker of ``tp`` ranks, each has a region of its own, which is a pool of the same number of blocks with
    ``head_shares[rank]`` of the heads; sizes here are those of all of them together."""

    model_revision: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tp: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_NBYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(sorted(ITEM_NBYTES))}")
        if min(self.block_size, self.num_layers, self.num_kv_heads, self.head_dim) <= 0:
            raise ValueError(f"every size of a KV layout is positive: {self}")
        if not 0 < self.tp <= self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} KV heads cannot be shared out to {self.tp} ranks")

    @property
    def head_shares(self) -> tuple[range, ...]:
        """The KV heads of each rank."""
        return share_out(self.num_kv_heads, self.tp)

    def of_rank(self, rank: int) -> KvLayout:
        """Of its region alone."""
        return replace(self, num_kv_heads=len(self.head_shares[rank]), tp=1)

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def row_nbytes(self) -> int:
        """One token's keys, or values, in one layer."""
        return self.num_kv_heads * self.head_dim * ITEM_NBYTES[self.dtype]

    @property
    def token_nbytes(self) -> int:
        return self.num_layers * 2 * self.row_nbytes

    @property
    def block_nbytes(self) -> int:
        return self.block_size * self.token_nbytes

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits, the same in every process for the same layout."""
        shares = [[heads.start, heads.stop] for heads in self.head_shares]
        return _digest({**self._content, "dtype": self.dtype, "block_size": self.block_size, "shares": shares})

    @cached_property
    def content_fingerprint(self) -> str:
        """As ``fingerprint``, of everything but block size, dtype and ranks."""
        return _digest(self._content)

    @property
    def _content(self) -> dict[str, object]:
        return {
            "order": "block,layer,kv,token,head,dim",
            "model_revision": self.model_revision,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }


def share_out(count: int, num_shares: int) -> tuple[range, ...]:
    """``count`` things in order, in shares that differ by one at most, larger ones first."""
    size, more = divmod(count, num_shares)
    ends = [size * share + min(share, more) for share in range(num_shares + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(ends))


def _digest(described: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
