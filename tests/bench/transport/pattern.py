"""What a pool holds: every eight bytes of every block tell which block of which fill they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

_WORD_BITS, _BLOCK_BITS = 20, 24  # blocks of up to 8 MiB, 16 million of them


@dataclass(frozen=True, slots=True)
class Arrival:
    """Blocks ``of`` a pool that was filled with ``salt`` should have come ``to`` these blocks."""

    salt: int
    of: Sequence[int]
    to: Sequence[int]


def fill(pool: U8, salt: int, blocks: Sequence[int] | None = None) -> None:
    """All of the pool, or some blocks; ``pool`` is [blocks, bytes], a multiple of eight each."""
    words, ramp = pool.view(np.uint64), _ramp(pool)
    for block in range(len(words)) if blocks is None else blocks:
        np.add(ramp, _first_word(salt, block), out=words[block])


def last_word(nbytes: int, salt: int, block: int) -> int:
    return int(_first_word(salt, block)) + nbytes // 8 - 1


def num_wrong(pool: U8, arrivals: Sequence[Arrival], salt: int | None = None) -> int:
    """How many blocks are not what should have arrived there.  With ``salt``, the one that all of the pool was filled with
    before, also how many changed that nobody should have touched."""
    expected = {} if salt is None else {block: _first_word(salt, block) for block in range(len(pool))}
    for arrival in arrivals:
        expected.update((to, _first_word(arrival.salt, of)) for of, to in zip(arrival.of, arrival.to, strict=True))
    words, ramp = pool.view(np.uint64), _ramp(pool)
    return sum(not np.array_equal(words[block], ramp + first) for block, first in expected.items())


def _ramp(pool: U8) -> U64:
    return np.arange(pool.shape[1] // 8, dtype=np.uint64)


def _first_word(salt: int, block: int) -> np.uint64:
    return np.uint64((salt << (_WORD_BITS + _BLOCK_BITS)) + (block << _WORD_BITS))
