"""From the start of posting until the writer knows that the block is in place and its owner can see it."""

from __future__ import annotations

import statistics
from contextlib import ExitStack

import numpy as np

from tests.bench.transport.bandwidth import POOL_BYTES
from tests.bench.transport.pair import Pair, check
from tests.bench.transport.pattern import Arrival, last_word
from tests.bench.transport.peers import KVFERRY, MEMCPY
from tests.bench.transport.rounds import NUM_WARM_UP
from tests.bench.transport.rows import Row, within
from tests.bench.transport.sides.base import Stamps

LIMIT_US = 40
BLOCKS_PER_ROUND = 10  # one takes no time
PAUSE_S = 0.001  # the threads fall asleep in between, as they do between chunks
SALT = 2  # 0 and 1 are in the pools already


def measure(nbytes: int, what: str, num_rounds: int, *, adds_memcpy: bool) -> Row:
    """The median over single blocks against LIMIT_US, plus memcpy's time for the same bytes where ``adds_memcpy``."""
    num_blocks = POOL_BYTES // nbytes
    count = (num_rounds + NUM_WARM_UP) * BLOCKS_PER_ROUND
    rng = np.random.default_rng(7)
    local, remote = (rng.permutation(num_blocks)[:count].tolist() for _ in range(2))
    with ExitStack() as stack:
        ours = stack.enter_context(Pair(KVFERRY, num_blocks, nbytes))
        memcpy = stack.enter_context(Pair(MEMCPY, num_blocks, nbytes))
        each = {"op": "write", "local": local, "remote": remote, "pause_s": PAUSE_S}
        memcpy.initiator.ask("fill", role="initiator", salt=SALT)
        copied = [Stamps(**stamps).seconds * 1e6 for stamps in memcpy.initiator.ask("run_each", **each)]
        ours.initiator.ask("fill", role="initiator", salt=SALT)
        ours.target.tell("watch_each", blocks=remote, words=[last_word(nbytes, SALT, block) for block in local])
        posted = [Stamps(**stamps) for stamps in ours.initiator.ask("run_each", **each)]
        taken_us = [
            (max(stamps.ended_ns, visible_ns) - stamps.began_ns) / 1e3
            for stamps, visible_ns in zip(posted, ours.target.hear(), strict=True)
        ]
        check(ours.target, "target", [Arrival(SALT, local, remote)])
    taken_us, copied = (values[NUM_WARM_UP * BLOCKS_PER_ROUND :] for values in (taken_us, copied))
    if not adds_memcpy:
        return within(f"latency, {what} vs {LIMIT_US} us", taken_us, LIMIT_US, "us")
    limit_us = statistics.median(copied) + LIMIT_US
    return within(f"latency, {what} vs memcpy + {LIMIT_US} us", taken_us, limit_us, "us")
