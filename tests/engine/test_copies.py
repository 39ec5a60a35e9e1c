"""Copies between a pool and its host tier, and the engine that has them made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Sequence_

import numpy as np
import pytest

from services.engine.blocks import BlockPool
from services.engine.copies import CopyThread
from services.engine.engine import Engine
from services.engine.hashing import extend_chain
from services.engine.host_copier import HostCopier
from services.engine.host_tier import Copy, Direction, HostTier
from services.engine.sampling_params import Sampling
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import Event, Sequence, SequenceId, StepFailed, TokenDrawn
from tests.engine.test_engine import Recorder
from transport import OutOfBounds, create

WAIT_S = 20.0


class Gate:
    """A copier that notes what it is asked for, waits to be let through, and fails where it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails: frozenset[str] = frozenset()
        self.open = threading.Event()
        self.entered = threading.Event()

    def down(self, blocks: Sequence_[int], slots: Sequence_[int]) -> None:
        self._pass("down")

    def up(self, slots: Sequence_[int], blocks: Sequence_[int]) -> None:
        self._pass("up")

    def _pass(self, what: str) -> None:
        self.asked.append(what)
        self.entered.set()
        assert self.open.wait(WAIT_S)
        if what in self.fails:
            raise RuntimeError("the device is gone")


class Answers(Recorder):
    """Waits for sequences to end."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Semaphore(0)

    def on_events(self, events: list[Event], step: object) -> None:
        for event in events:
            if isinstance(event, StepFailed) or (isinstance(event, TokenDrawn) and event.finish):
                self.ended.release()

    def answer(self, e: Engine, name: str, tokens: list[int]) -> Sequence:
        q = Sequence(SequenceId(name), tokens, Sampling(), 1, frozenset(), [b"root"])
        with e.exclusive() as scheduler:
            scheduler.add(q)
        assert self.ended.acquire(timeout=WAIT_S)
        return q


def copy(id_: int, direction: Direction) -> Copy:
    return Copy(id_, direction, (0,), (0,))


def test_bytes_go_down_and_come_back() -> None:
    nbytes = 5000
    with create("loopback") as transport, transport.allocate(8 * nbytes) as pool:
        copier = HostCopier(pool, nbytes, 6)
        blocks = np.frombuffer(pool.view, np.uint8).reshape(8, nbytes)
        blocks[:] = np.random.default_rng(1).integers(0, 256, blocks.shape, np.uint8)
        before = blocks.copy()
        copier.down([7, 0, 3], [5, 1, 0])
        assert np.array_equal(blocks, before)
        blocks[:] = 0
        copier.up([1, 5], [2, 6])
        copier.up([0], [0])
        expected = np.zeros_like(before)
        expected[[2, 6, 0]] = before[[0, 7, 3]]
        assert np.array_equal(blocks, expected)
        with pytest.raises(OutOfBounds):
            copier.up([6], [0])
        with pytest.raises(OutOfBounds):
            copier.down([8], [0])
        del blocks


def test_who_waits_is_served_before_what_is_saved() -> None:
    gate, ended = Gate(), threading.Semaphore(0)
    done: list[tuple[int, bool]] = []

    def end(copy: Copy, ok: bool) -> None:
        done.append((copy.id, ok))
        ended.release()

    gate.fails = frozenset({"up"})
    with CopyThread(gate, 10) as copies:
        copies.start(copy(1, Direction.DOWN), end)
        assert gate.entered.wait(WAIT_S)
        copies.start(copy(2, Direction.DOWN), end)
        copies.start(copy(3, Direction.UP), end)
        gate.open.set()
        for _ in range(3):
            assert ended.acquire(timeout=WAIT_S)
        assert done == [(1, True), (3, False), (2, True)]
        assert copies.loaded_bytes_per_s == 0
        gate.fails = frozenset()
        copies.start(copy(4, Direction.UP), end)
        assert ended.acquire(timeout=WAIT_S)
        assert copies.loaded_bytes_per_s > 0


def test_closing_ends_after_the_copy_under_way() -> None:
    gate = Gate()
    done: list[int] = []
    copies = CopyThread(gate, 10)
    with copies:
        copies.start(copy(1, Direction.UP), lambda copy, ok: done.append(copy.id))
        copies.start(copy(2, Direction.UP), lambda copy, ok: done.append(copy.id))
        assert gate.entered.wait(WAIT_S)
        threading.Timer(0.05, gate.open.set).start()
    assert gate.asked in (["up"], ["up", "up"])
    assert done == [1, 2][: len(gate.asked)], "what was begun has ended"


def wait_until(e: Engine, holds: Callable[[], bool]) -> None:
    began_s = time.monotonic()
    while True:
        with e.exclusive(wake=False):
            if holds():
                return
        assert time.monotonic() - began_s < WAIT_S
        time.sleep(0.005)


@pytest.mark.parametrize("breaks", [False, True])
def test_an_engine_is_woken_by_a_copy_and_computes_what_could_not_be_copied(breaks: bool) -> None:
    gate, answers = Gate(), Answers()
    gate.open.set()
    gate.fails = frozenset({"up"} if breaks else ())
    pool = BlockPool(8)
    scheduler = Scheduler(pool, Limits(block_size=4, context_length=64), HostTier(pool, 32))
    with CopyThread(gate, 10) as copies:
        e = Engine(scheduler, answers, answers, copies=copies)
        e.start()
        prompt = list(range(20))
        hashes = extend_chain(b"root", prompt, 4)
        answers.answer(e, "first", list(prompt))
        wait_until(e, lambda: all(map(scheduler.host.holds, hashes)))
        number = iter(range(100, 200))
        while pool.find(hashes[0]) is not None:
            answers.answer(e, "other", [next(number)] * 20)
        computed = e.work.prefill_tokens
        again = answers.answer(e, "again", list(prompt))
        assert e.work.prefill_tokens - computed == (20 if breaks else 4)
        assert again.num_cached == (0 if breaks else 16)
        assert e.host_totals.failed_copies == breaks
        e.close()
        scheduler.check_integrity()
