"""From the start of posting until the writer knows that the block is in place and its owner can see it."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

import numpy as np

from tests.bench.transport.bandwidth import POOL_BYTES
from tests.bench.transport.pair import Pair, check
from tests.bench.transport.pattern import Arrival, last_word
from tests.bench.transport.peers import KVFERRY, MEMCPY
from tests.bench.transport.rounds import NUM_WARM_UP, rounds
from tests.bench.transport.rows import Row, within
from tests.bench.transport.sides.base import Stamps

LIMIT_US = 40
BLOCKS_PER_ROUND = 10  # one takes no time
PAUSE_S = 0.001  # the threads fall asleep in between, as they do between chunks


def measure(nbytes: int, what: str, num_rounds: int, *, adds_memcpy: bool) -> Row:
    """The median over single blocks against LIMIT_US, plus memcpy's time for the same bytes where ``adds_memcpy``."""
    num_blocks = POOL_BYTES // nbytes
    rng = np.random.default_rng(7)
    ours_us, memcpy_us = [], []
    with ExitStack() as stack:
        ours = stack.enter_context(Pair(KVFERRY, num_blocks, nbytes))
        memcpy = stack.enter_context(Pair(MEMCPY, num_blocks, nbytes))
        num_warm_up = NUM_WARM_UP * BLOCKS_PER_ROUND
        for round_ in rounds(f"latency, {what}", num_rounds * BLOCKS_PER_ROUND, num_warm_up):
            local, remote = (int(i) for i in rng.integers(num_blocks, size=2))
            salt = 2 + num_warm_up + round_  # 0 and 1 are in the pools already
            memcpy.initiator.ask("fill", role="initiator", salt=salt, blocks=[local])
            time.sleep(PAUSE_S)
            copied = Stamps(**memcpy.initiator.ask("run", op="write", local=[local], remote=[remote]))
            taken_ns = _until_committed_and_visible_ns(ours, nbytes, local, remote, salt)
            if round_ >= 0:
                ours_us.append(taken_ns / 1e3)
                memcpy_us.append(copied.seconds * 1e6)
    if not adds_memcpy:
        return within(f"latency, {what} vs {LIMIT_US} us", ours_us, LIMIT_US, "us")
    limit_us = statistics.median(memcpy_us) + LIMIT_US
    return within(f"latency, {what} vs memcpy + {LIMIT_US} us", ours_us, limit_us, "us")


def _until_committed_and_visible_ns(pair: Pair, nbytes: int, local: int, remote: int, salt: int) -> int:
    pair.initiator.ask("fill", role="initiator", salt=salt, blocks=[local])
    pair.target.tell("watch", block=remote, word=last_word(nbytes, salt, local))
    time.sleep(PAUSE_S)
    stamps = Stamps(**pair.initiator.ask("run", op="write", local=[local], remote=[remote]))
    visible_ns: int = pair.target.hear()
    check(pair.target, "target", [Arrival(salt, [local], [remote])])
    return max(stamps.ended_ns, visible_ns) - stamps.began_ns
