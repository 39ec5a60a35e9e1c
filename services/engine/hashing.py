"""Chain hashes of full blocks: equal hashes mean an equal prefix, on every process and machine.

A block's hash covers its tokens and the hash of the block before it, so one hash names a whole prefix (the scheme of
vLLM's automatic prefix caching).  The chain starts from the model's revision and the tenant's salt: unequal weights or
tenants never share a block, nor can one tenant learn what another has cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

HASH_NBYTES = 16


def chain_root(model_revision: str, salt: bytes = b"") -> bytes:
    return hashlib.blake2b(salt, digest_size=HASH_NBYTES, key=hashlib.sha256(model_revision.encode()).digest()).digest()


def extend_chain(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The hashes of the full blocks in ``token_ids``, which follow the block (or root) hashed as ``parent``."""
    packed = np.asarray(token_ids, dtype="<u4").tobytes()
    step = 4 * block_size
    hashes = []
    for start in range(0, len(packed) - step + 1, step):
        parent = hashlib.blake2b(packed[start : start + step], digest_size=HASH_NBYTES, key=parent).digest()
        hashes.append(parent)
    return hashes
