"""Replays a trace in Mooncake's format (a JSON object a line, with hash_ids, one a block): what workers with caches of
limited size store and evict, and what a gateway looks up."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import takewhile
from pathlib import Path
from typing import Any

from tests.bench.directory.sides import Side

NUM_WORKERS = 64
# Of all distinct blocks, so many fit into the caches together.
CACHED_SHARE = 0.5


class Kind(Enum):
    LOOK_UP = auto()
    STORED = auto()
    REMOVED = auto()


@dataclass(frozen=True, slots=True)
class Step:
    kind: Kind
    worker: int
    hashes: list[bytes]


def read(path: Path) -> list[list[int]]:
    """The chains of all requests, in order."""
    with path.open() as lines:
        return [json.loads(line)["hash_ids"] for line in lines]


def steps(chains: Sequence[Sequence[int]]) -> list[Step]:
    """Each request is looked up and goes to the worker that holds most of it, among equals to the one that has had the
    fewest blocks to compute.  A worker evicts what was unused for longest, the end of a chain before its beginning."""
    distinct = {number for chain in chains for number in chain}
    capacity = max(*map(len, chains), int(len(distinct) * CACHED_SHARE / NUM_WORKERS))
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(NUM_WORKERS)]
    computed = [0] * NUM_WORKERS
    found = []
    for chain in chains:
        found.append(Step(Kind.LOOK_UP, 0, [_hash(number) for number in chain]))
        lengths = [sum(1 for _ in takewhile(cache.__contains__, chain)) for cache in caches]
        worker = min(range(NUM_WORKERS), key=lambda w: (-lengths[w], computed[w]))
        cache = caches[worker]
        missing = chain[lengths[worker] :]
        computed[worker] += len(missing)
        for number in reversed(chain):
            cache[number] = None
            cache.move_to_end(number)
        evicted = [cache.popitem(last=False)[0] for _ in range(len(cache) - capacity)]
        if missing:
            # From the chain's first block, where an event of dynamo's begins that names no parent.
            found.append(Step(Kind.STORED, worker, [_hash(number) for number in chain]))
        if evicted:
            found.append(Step(Kind.REMOVED, worker, [_hash(number) for number in evicted]))
    return found


def replay(side: Side, plan: Sequence[Step]) -> tuple[dict[Kind, float], list[dict[int, int]]]:
    """Seconds by kind of step, of the processor for changes, and what the lookups found."""
    make = {Kind.LOOK_UP: lambda step: side.chain(step.hashes),
            Kind.STORED: lambda step: side.stored(step.worker, step.hashes),
            Kind.REMOVED: lambda step: side.removed(step.worker, step.hashes)}  # fmt: skip
    ready: list[tuple[Kind, Any]] = [(step.kind, make[step.kind](step)) for step in plan]
    seconds = dict.fromkeys(Kind, 0.0)
    found = []
    for kind, argument in ready:
        if kind is Kind.LOOK_UP:
            started_s = time.perf_counter()
            answer = side.find(argument)
            seconds[kind] += time.perf_counter() - started_s
            found.append(side.lengths(answer))
        else:
            started_s = time.process_time()
            side.apply(argument)
            seconds[kind] += time.process_time() - started_s
    return seconds, found


def _hash(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()
