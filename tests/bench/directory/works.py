"""What is measured, each on both sides in turn, round by round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.runtime.garbage import resident_nbytes
from tests.bench.directory import trace
from tests.bench.directory.load import CHAIN_BLOCKS, NUM_COMMON, NUM_WORKERS, OWN_BLOCKS, Load
from tests.bench.directory.sides import PEER, Dynamo, Kvferry, Side
from tests.bench.transport.rows import Row, less_is_better, more_is_better, within

LOOKUP_US = 100.0
INGEST_BLOCKS_PER_S = 300e3
ENTRY_NBYTES = 120.0
LOOKUP_GOAL, INGEST_GOAL = 1.0, 0.5
# Of each kind and round.
NUM_LOOKUPS = 500
NUM_CHANGED = 200


class Disagreement(Exception):
    """The two sides do not find the same."""


class Works:
    """Both sides filled with one load.  ``with_peer`` False: ours alone, against the fixed goals."""

    def __init__(self, num_blocks: int, rounds: int, *, with_peer: bool) -> None:
        self._load = Load(num_blocks)
        self._rounds = rounds
        self._ours = Kvferry(
            NUM_WORKERS, max_entries=2 * self._load.num_blocks + NUM_COMMON * NUM_WORKERS * CHAIN_BLOCKS
        )
        self._sides: dict[str, Side] = {self._ours.name: self._ours}
        if with_peer:
            self._sides[PEER] = Dynamo()
        self._nbytes = {name: self._fill(side) for name, side in self._sides.items()}
        self.num_entries = self._ours.view.index.num_entries
        assert not self._ours.view.index.num_left_out

    def memory(self) -> list[Row]:
        per_entry = {name: [nbytes / self.num_entries] for name, nbytes in self._nbytes.items()}
        return self._rows("memory of a block and holder", per_entry, ENTRY_NBYTES, "bytes", 1.0)

    def lookup(self) -> list[Row]:
        load = self._load
        kinds = {
            "some workers hold it": lambda: load.chain(load.rng.randrange(load.num_chains)),
            "all hold it": lambda: load.common(load.rng.randrange(NUM_COMMON)),
            "none holds it": load.unknown,
        }
        rows = []
        for kind, draw in kinds.items():
            p50_us: dict[str, list[float]] = {name: [] for name in self._sides}
            rates: dict[str, list[float]] = {name: [] for name in self._sides}
            for number in range(self._rounds):
                chains = [draw() for _ in range(NUM_LOOKUPS)]
                self._compare(chains[:20])
                for name, side in self._in_turn(number):
                    taken = sorted(_each(side.find, [side.chain(chain) for chain in chains]))
                    p50_us[name].append(1e6 * taken[len(taken) // 2])
                    rates[name].append(len(taken) / sum(taken))
            work = f"look up {CHAIN_BLOCKS} blocks, {kind}"
            rows.append(within(f"{work}: p50 / allowed", p50_us[self._ours.name], LOOKUP_US, "us"))
            if PEER in rates:
                rows.append(
                    more_is_better(f"{work} / {PEER}", rates[self._ours.name], rates[PEER], LOOKUP_GOAL, "lookups/s")
                )
        return rows

    def ingest(self) -> list[Row]:
        """By processor time, as the peer has a thread of its own; a lookup at the end waits for it."""
        rates: dict[str, dict[str, list[float]]] = {
            kind: {name: [] for name in self._sides} for kind in ("removed", "stored")
        }
        for number in range(self._rounds):
            numbers = self._load.rng.sample(range(self._load.num_chains), min(NUM_CHANGED, self._load.num_chains))
            # The end of a chain goes first; what all conversations begin with stays.
            own = [(self._load.home(n), self._load.chain(n)[-OWN_BLOCKS:][::-1]) for n in numbers]
            all_ = [(self._load.home(n), self._load.chain(n)) for n in numbers]
            for name, side in self._in_turn(number):
                removed = [side.removed(worker, hashes) for worker, hashes in own]
                stored = [side.stored(worker, hashes) for worker, hashes in all_]
                end = side.chain(all_[0][1])
                for kind, messages, changed in (("removed", removed, own), ("stored", stored, all_)):
                    seconds = _processor_s(side, messages, end)
                    rates[kind][name].append(sum(len(hashes) for _, hashes in changed) / seconds)
            self._compare([chain for _, chain in all_[:20]])
        return [
            row
            for kind, by_side in rates.items()
            for row in self._rate_rows(f"blocks {kind} a second of one core", by_side)
        ]

    def _rate_rows(self, work: str, rates: Mapping[str, list[float]]) -> list[Row]:
        ours = rates[self._ours.name]
        rows = [more_is_better(f"{work} / asked", ours, [INGEST_BLOCKS_PER_S] * len(ours), 1.0, "blocks/s")]
        if PEER in rates:
            rows.append(more_is_better(f"{work} / {PEER}", ours, rates[PEER], INGEST_GOAL, "blocks/s"))
        return rows

    def _rows(
        self, work: str, values: Mapping[str, Sequence[float]], limit: float, unit: str, goal: float
    ) -> list[Row]:
        ours = values[self._ours.name]
        rows = [within(f"{work} / allowed", ours, limit, unit)]
        if PEER in values:
            rows.append(less_is_better(f"{work} / {PEER}", ours, values[PEER], goal, unit))
        return rows

    def _fill(self, side: Side) -> int:
        """Returns by how much the process grew."""
        gc.collect()
        before = resident_nbytes()
        for worker, chain in self._load.holdings():
            side.apply(side.stored(worker, chain))
        side.find(side.chain(self._load.common(0)))
        gc.collect()
        return resident_nbytes() - before

    def _in_turn(self, number: int) -> list[tuple[str, Side]]:
        sides = list(self._sides.items())
        return sides if number % 2 else sides[::-1]

    def _compare(self, chains: Sequence[Sequence[bytes]]) -> None:
        for chain in chains:
            agree([side.lengths(side.find(side.chain(chain))) for side in self._sides.values()])


def replayed(path: Path, rounds: int, *, with_peer: bool) -> list[Row]:
    """The whole trace on new sides, round by round."""
    plan = trace.steps(trace.read(path))
    makers: dict[str, Callable[[], Side]] = {Kvferry.name: lambda: Kvferry(trace.NUM_WORKERS, max_entries=10**8)}
    if with_peer:
        makers[PEER] = Dynamo
    counts = dict.fromkeys(trace.Kind, 0)
    for step in plan:
        counts[step.kind] += 1 if step.kind is trace.Kind.LOOK_UP else len(step.hashes)
    rates: dict[trace.Kind, dict[str, list[float]]] = {kind: {name: [] for name in makers} for kind in trace.Kind}
    for number in range(rounds):
        answers = []
        for name, make in list(makers.items())[:: 1 if number % 2 else -1]:
            seconds, found = trace.replay(make(), plan)
            answers.append(found)
            for kind in trace.Kind:
                rates[kind][name].append(counts[kind] / seconds[kind])
        agree(answers)
    rows = []
    for kind, work, unit, goal in (
        (trace.Kind.LOOK_UP, "look up", "lookups/s", LOOKUP_GOAL),
        (trace.Kind.STORED, "stored", "blocks/s", INGEST_GOAL),
        (trace.Kind.REMOVED, "removed", "blocks/s", INGEST_GOAL),
    ):
        ours = rates[kind][Kvferry.name]
        if PEER in makers:
            rows.append(more_is_better(f"trace: {work} / {PEER}", ours, rates[kind][PEER], goal, unit))
        elif kind is not trace.Kind.LOOK_UP:
            rows.append(more_is_better(f"trace: {work} / asked", ours, [INGEST_BLOCKS_PER_S] * rounds, 1.0, unit))
        else:
            rows.append(within(f"trace: {work} / allowed", [1e6 / rate for rate in ours], LOOKUP_US, "us"))
    return rows


def agree(answers: Sequence[Any]) -> None:
    if any(answer != answers[0] for answer in answers):
        raise Disagreement(f"the sides do not find the same: {str(answers)[:500]}")


def _each(call: Callable[[Any], Any], arguments: Sequence[Any]) -> list[float]:
    """Seconds of each call."""
    taken = []
    for argument in arguments:
        started_s = time.perf_counter()
        call(argument)
        taken.append(time.perf_counter() - started_s)
    return taken


def _processor_s(side: Side, messages: Sequence[Any], end: Any) -> float:
    started_s = time.process_time()
    for message in messages:
        side.apply(message)
    side.find(end)
    return time.process_time() - started_s
