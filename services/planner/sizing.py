"""How many workers a design needs to keep the objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from kvferry.bench.slo import Slo
from services.planner.designs import Design, Size, fleet, pool
from services.planner.fleet import AT_ONCE, Fleet, Gateway, Link, Pool, Run, simulate
from services.planner.hardware import Worker
from services.planner.step_cost import StepCost
from services.planner.traffic import Traffic

MOST_WORKERS = 4096


@dataclass(frozen=True, slots=True)
class Attained:
    """Shares of the requests that keep all objectives, those on the first token alone, and those on the others."""

    all: float
    first: float
    rest: float


def is_good(run: Run, slo: Slo) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """By request: whether its first token, and whether the rest of it, come as ``slo`` says.  ``run`` was bound by
    ``slo.itl``: as many gaps may be longer as leave a request's 99th percentile below it."""
    first = np.isfinite(run.first_s)
    if slo.ttft is not None:
        first &= run.ttft_s <= slo.ttft
    rest = np.isfinite(run.end_s)
    if slo.itl is not None:
        rest &= run.num_slow <= np.floor(0.01 * np.maximum(0, run.traffic.num_output - 2))
    if slo.tpot is not None:
        rest &= run.tpot_s <= slo.tpot
    if slo.e2e is not None:
        rest &= run.e2e_s <= slo.e2e
    return first, rest


def attained(run: Run, slo: Slo) -> Attained:
    first, rest = is_good(run, slo)
    return Attained(float((first & rest).mean()), float(first.mean()), float(rest.mean()))


class Sizing:
    """Of designs for one traffic and its objectives.  Remembers what it has simulated."""

    def __init__(self, traffic: Traffic, slo: Slo, tell: Callable[[], None] = lambda: None) -> None:
        """``tell`` is called after each simulation."""
        self.traffic, self.slo, self._tell = traffic, slo, tell
        self._known: dict[tuple[object, ...], Attained] = {}
        self.num_simulated = 0

    def run(self, design: Design, size: Size) -> Run:
        itl = self.slo.itl if self.slo.itl is not None else float("inf")
        self.num_simulated += 1
        made = simulate(fleet(design, size), self.traffic, itl)
        self._tell()
        return made

    def attained(self, design: Design, size: Size) -> Attained:
        key = (
            str(design.decode),
            _name(design.prefill),
            design.step_tokens,
            design.mixed_tokens,
            design.patience,
            size,
        )
        if key not in self._known:
            self._known[key] = attained(self.run(design, size), self.slo)
        return self._known[key]

    def colocated(self, design: Design, share: float, most: int) -> int | None:
        """The fewest workers that do, ``most`` at most."""
        return fewest(lambda n: self.attained(design, Size(0, n)).all >= share, self._guess(design.decode), most)

    def prefill_alone(self, worker: Worker, step_tokens: int, patience: float, share: float) -> int | None:
        """The fewest that keep the objective on the first token, if decode workers are no hindrance."""
        traffic = replace(self.traffic, num_output=np.ones_like(self.traffic.num_output))
        decode = Pool(1, StepCost(), 1, 2**60, 2**30)
        gateway = Gateway(decode_computes=False, patience=patience)

        def enough(count: int) -> bool:
            key = ("prefill", str(worker), step_tokens, patience, count)
            if key not in self._known:
                made = Fleet(decode, pool(worker, count, step_tokens), _NO_LINK, gateway)
                self._known[key] = self._attained_alone(made, traffic, Slo(ttft=self.slo.ttft))
            return self._known[key].all >= share

        return fewest(enough, self._guess(worker), MOST_WORKERS)

    def decode_alone(self, worker: Worker, share: float) -> int | None:
        """The fewest that keep the other objectives, if prompts took no time and handovers neither."""
        instant = Pool(64, StepCost(additive=(0.0, 1e-9, 0.0, 0.0, 0.0, 0.0)), 2**40, 2**60, 2**30)

        def enough(count: int) -> bool:
            key = ("decode", str(worker), count)
            if key not in self._known:
                made = Fleet(pool(worker, count, 2**20), instant, _NO_LINK, AT_ONCE)
                self._known[key] = self._attained_alone(made, self.traffic, self.slo)
            return self._known[key].all >= share

        return fewest(enough, self._guess(worker), MOST_WORKERS)

    def for_links(self, design: Design, size: Size) -> Size:
        """So many of each role at least that their links carry the KV of all prompts."""
        assert design.prefill is not None
        shipped = float(self.traffic.num_input[self.traffic.num_output > 1].sum(dtype=np.int64))
        bytes_per_s = shipped * design.prefill.kv_token_nbytes / self.traffic.duration_s
        return Size(
            max(size.num_prefill, ceil(bytes_per_s / design.prefill.link_bytes_per_s)),
            max(size.num_decode, ceil(bytes_per_s / design.decode.link_bytes_per_s)),
        )

    def _attained_alone(self, made: Fleet, traffic: Traffic, slo: Slo) -> Attained:
        self.num_simulated += 1
        run = simulate(made, traffic, slo.itl if slo.itl is not None else float("inf"))
        self._tell()
        return attained(run, slo)

    def _guess(self, worker: Worker) -> int:
        """Workers whose time the traffic's prompts would take, in full steps."""
        tokens = 2048.0
        each_s = worker.cost.step_s((1.0, tokens, tokens * tokens / 2, tokens, 0.0, 0.0)) / tokens
        to_compute = float((self.traffic.num_input - self.traffic.num_cached).sum(dtype=np.int64))
        return max(1, round(to_compute * each_s / self.traffic.duration_s))


_NO_LINK = Link(0.0, 1.0, 1.0, 0.0)


def fewest(enough: Callable[[int], bool], guess: int, most: int) -> int | None:
    """The least count of 1 to ``most`` that is enough, where more than enough is enough; None when there is none."""
    low, high = 0, max(1, min(guess, most))
    while not enough(high):
        low = high
        if high >= most:
            return None
        high = min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def _name(worker: Worker | None) -> str | None:
    return None if worker is None else str(worker)
