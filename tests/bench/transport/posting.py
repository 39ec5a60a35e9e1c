"""What a batch costs the thread that posts it, and what it leaves of the GIL to the others."""

from __future__ import annotations

import numpy as np

from tests.bench.transport.pair import Pair
from tests.bench.transport.peers import KVFERRY
from tests.bench.transport.rounds import NUM_WARM_UP, rounds
from tests.bench.transport.rows import Row, more_is_better, within

NUM_BLOCKS, NBYTES = 1024, 65536
LIMIT_US = 1.0
BIG = 16  # this many times the blocks take a tenth of a second, in which the GIL's switches do not count
GIL_GOAL = 0.9


def measure(num_rounds: int) -> list[Row]:
    rng = np.random.default_rng(7)
    posting_us: list[float] = []
    alone: list[float] = []
    beside: list[float] = []
    with Pair(KVFERRY, 2 * NUM_BLOCKS, NBYTES) as pair:
        last_s = 0.1
        for round_ in rounds("posting", num_rounds):
            local, remote = (rng.permutation(2 * NUM_BLOCKS)[:NUM_BLOCKS].tolist() for _ in range(2))
            stamps = pair.run("write", local, remote, salt=1 + NUM_WARM_UP + round_)
            rates = pair.initiator.ask("counting", local=local * BIG, remote=remote * BIG, alone_s=last_s)
            last_s = BIG * stamps.seconds
            if round_ >= 0:
                posting_us.append((stamps.posted_ns - stamps.began_ns) / 1e3 / NUM_BLOCKS)
                alone.append(rates[0])
                beside.append(rates[1])
    return [
        within(f"posting {NUM_BLOCKS} blocks, each vs {LIMIT_US:g} us", posting_us, LIMIT_US, "us"),
        more_is_better("a Python thread beside a transfer vs alone", beside, alone, GIL_GOAL, "M counts/s"),
    ]
