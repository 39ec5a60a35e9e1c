"""Scattered blocks, written or read in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np

from tests.bench.transport.pair import Pair
from tests.bench.transport.peers import KVFERRY, Library
from tests.bench.transport.rounds import NUM_WARM_UP, rounds
from tests.bench.transport.rows import Row, more_is_better

# Larger than the caches, as real pools are: what lies in a cache from before must not decide.
POOL_BYTES = 128 << 20
# Of processes, one after the other: a library's speed may depend on how its threads happened to come to lie on the cores.
NUM_SETS = 3


def measure(
    op: str,
    num_blocks: int,
    nbytes: int,
    goals: Mapping[Library, float],
    num_rounds: int,
    environment: Mapping[str, str] | None = None,
) -> list[Row]:
    """A row per peer.  ``environment`` is that of every side but memcpy's, and makes UCX take another way."""
    what = f"{op} {num_blocks} x {nbytes >> 10} KiB" + (", TCP" if environment else "")
    pool_blocks = max(2 * num_blocks, POOL_BYTES // nbytes)
    rng = np.random.default_rng(7)
    libraries = [KVFERRY, *goals]
    rates: dict[Library, list[float]] = {library: [] for library in libraries}
    for set_ in range(NUM_SETS):
        with ExitStack() as stack:
            pairs = {
                library: stack.enter_context(Pair(library, pool_blocks, nbytes, environment)) for library in libraries
            }
            for round_ in rounds(f"{what}, {set_ + 1} of {NUM_SETS}", -(-num_rounds // NUM_SETS)):
                local, remote = (rng.permutation(pool_blocks)[:num_blocks].tolist() for _ in range(2))
                first = round_ % len(libraries)
                for library in libraries[first:] + libraries[:first]:
                    stamps = pairs[library].run(op, local, remote, salt=1 + NUM_WARM_UP + round_)
                    if round_ >= 0:
                        rates[library].append(num_blocks * nbytes / stamps.seconds / 1e9)
    return [
        more_is_better(f"{what} vs {library.name}", rates[KVFERRY], rates[library], goal, "GB/s")
        for library, goal in goals.items()
    ]
