"""Four processes that write into one pool at once, against one that writes as much alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from tests.bench.transport.pair import check, connect
from tests.bench.transport.pattern import Arrival
from tests.bench.transport.peers import KVFERRY
from tests.bench.transport.process import Process
from tests.bench.transport.rounds import NUM_WARM_UP, rounds
from tests.bench.transport.rows import Row, more_is_better
from tests.bench.transport.sides.base import Stamps

NUM_WRITERS = 4
NUM_BLOCKS, NBYTES = 2048, 65536  # of all writers together
LEAD_NS = 20_000_000  # until the common start: every process has its orders by then and sleeps


def measure(num_rounds: int) -> Row:
    rng = np.random.default_rng(7)
    one, four = [], []
    with ExitStack() as stack:
        target = stack.enter_context(Process(KVFERRY, "target", 2 * NUM_BLOCKS, NBYTES))
        writers = [stack.enter_context(Process(KVFERRY, "initiator", NUM_BLOCKS, NBYTES)) for _ in range(NUM_WRITERS)]
        for salt, writer in enumerate(writers):
            connect(writer, target)
            writer.ask("fill", role="initiator", salt=salt)
            for half in (range(NUM_BLOCKS), range(NUM_BLOCKS, 2 * NUM_BLOCKS)):  # maps every page, as in Pair
                writer.ask("run", op="write", local=range(NUM_BLOCKS), remote=half)
        for round_ in rounds("four writers", num_rounds):
            salt = NUM_WRITERS + NUM_WARM_UP + round_
            one.append(_gb_per_s(target, writers[:1], salt, rng))
            four.append(_gb_per_s(target, writers, salt, rng))
    what = f"{NUM_WRITERS} writers of {NUM_BLOCKS} x {NBYTES >> 10} KiB in all vs one"
    return more_is_better(what, four[NUM_WARM_UP:], one[NUM_WARM_UP:], 1.0, "GB/s")


def _gb_per_s(target: Process, writers: Sequence[Process], salt: int, rng: np.random.Generator) -> float:
    """All bytes over the time from the first start to the last end."""
    target.ask("fill", role="target", salt=salt)
    share = NUM_BLOCKS // len(writers)
    local = [rng.permutation(NUM_BLOCKS)[:share].tolist() for _ in writers]
    remote = rng.permutation(2 * NUM_BLOCKS)[:NUM_BLOCKS].reshape(len(writers), share).tolist()
    at_ns = time.monotonic_ns() + LEAD_NS
    for writer, here, there in zip(writers, local, remote, strict=True):
        writer.tell("run", op="write", local=here, remote=there, at_ns=at_ns)
    stamps = [Stamps(**writer.hear()) for writer in writers]
    arrivals = [Arrival(i, here, there) for i, (here, there) in enumerate(zip(local, remote, strict=True))]
    check(target, "target", arrivals, salt)
    return NUM_BLOCKS * NBYTES / (max(s.ended_ns for s in stamps) - min(s.began_ns for s in stamps))
