"""Which blocks the workers hold in the bench: conversations of 256 blocks that begin with a few system prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

NUM_WORKERS = 64
CHAIN_BLOCKS = 256
NUM_PROMPTS = 64
PROMPT_BLOCKS = 32
OWN_BLOCKS = CHAIN_BLOCKS - PROMPT_BLOCKS
# So many chains are held by all workers, all of each.
NUM_COMMON = 64
# Of so many conversations, one is in half on a second worker too.
MOVED = 8


@dataclass(frozen=True, slots=True)
class Holding:
    worker: int
    chain: int
    num_blocks: int


class Load:
    """Hashes are drawn from ``seed``, 16 bytes each; those of one chain never come twice."""

    def __init__(self, num_blocks: int, seed: int = 1) -> None:
        rng = random.Random(seed)
        common = NUM_PROMPTS * PROMPT_BLOCKS + NUM_COMMON * CHAIN_BLOCKS
        self.num_chains = max(NUM_COMMON, (num_blocks - common) // OWN_BLOCKS)
        self.num_blocks = common + self.num_chains * OWN_BLOCKS
        self._prompts = [rng.randbytes(PROMPT_BLOCKS * 16) for _ in range(NUM_PROMPTS)]
        self._common = [rng.randbytes(CHAIN_BLOCKS * 16) for _ in range(NUM_COMMON)]
        self._own = rng.randbytes(self.num_chains * OWN_BLOCKS * 16)
        self.rng = rng

    def chain(self, number: int) -> list[bytes]:
        """Of a conversation, first block first."""
        own = self._own[number * OWN_BLOCKS * 16 : (number + 1) * OWN_BLOCKS * 16]
        return _split(self._prompts[number % NUM_PROMPTS]) + _split(own)

    def common(self, number: int) -> list[bytes]:
        return _split(self._common[number])

    def unknown(self) -> list[bytes]:
        """A chain that nobody holds."""
        return _split(self.rng.randbytes(CHAIN_BLOCKS * 16))

    def home(self, number: int) -> int:
        """The worker that holds all of a conversation."""
        return number * 7919 // NUM_PROMPTS % NUM_WORKERS

    def holdings(self) -> Iterator[tuple[int, list[bytes]]]:
        """(worker, chain) in the order in which they come to be."""
        for number in range(NUM_COMMON):
            for worker in range(NUM_WORKERS):
                yield worker, self.common(number)
        for number in range(self.num_chains):
            chain = self.chain(number)
            yield self.home(number), chain
            if number % MOVED == 0:
                yield (self.home(number) + 1) % NUM_WORKERS, chain[: CHAIN_BLOCKS // 2]


def _split(data: bytes) -> list[bytes]:
    return [data[i : i + 16] for i in range(0, len(data), 16)]
