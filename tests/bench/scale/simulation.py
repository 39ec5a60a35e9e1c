"""Fleets of up to 10,000 workers in virtual time, as one cluster and as cells: the real schedulers and routing, chats whose
rate grows with the fleet, and steps that take what they were measured to take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.candidates import Candidate, Role
from gateway.costs import Demand
from gateway.routing import Policy, Route
from services.engine.scheduler import Limits
from services.planner.simulator.arrivals import Served
from services.planner.simulator.cluster import ByPolicy, Cluster
from services.planner.simulator.cost_model import CostModel
from services.planner.simulator.worker import WorkerSpec
from tests.bench.routing.loads import Chats

NUM_BLOCKS = 1024  # of each worker
TURNS = 3
RATE_OF_A_WORKER = 0.25  # requests/s
WORKERS_OF_A_CHAT = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """``num_cells`` clusters that know nothing of one another, each with a chat for every four of its workers."""

    num_cells: int
    workers_of_a_cell: int

    @classmethod
    def of(cls, text: str) -> Shape:
        """``10x100``.  Raises ValueError."""
        num_cells, workers = map(int, text.split("x"))
        return cls(num_cells, workers)

    @property
    def requests_per_s(self) -> float:
        """Of all together."""
        return RATE_OF_A_WORKER * self.num_cells * self.workers_of_a_cell

    def __str__(self) -> str:
        return f"{self.num_cells:,} x {self.workers_of_a_cell:,}"


@dataclass(slots=True)
class Timed:
    """The gateway's own choice, and the processor time that it took."""

    choose: ByPolicy
    taken_s: float = 0.0

    def __call__(self, candidates: Sequence[Candidate], demand: Demand, request_id: str) -> Route:
        begun = time.process_time()
        try:
            return self.choose(candidates, demand, request_id)
        finally:
            self.taken_s += time.process_time() - begun


def simulate(shape: Shape, costs: CostModel, block_nbytes: int) -> dict[str, float]:
    """By what is told: seconds, shares and numbers."""
    served: list[Served] = []
    taken_s = 0.0
    for seed in range(shape.num_cells):
        choose = Timed(ByPolicy(Policy.KV_AWARE))
        cluster = Cluster(_workers(shape.workers_of_a_cell, block_nbytes), costs, choose)
        chats = Chats(num_chats=-(-shape.workers_of_a_cell // WORKERS_OF_A_CHAT), num_turns=TURNS)
        served += cluster.run(chats.arrivals(RATE_OF_A_WORKER * shape.workers_of_a_cell, seed))
        cluster.check_integrity()
        taken_s += choose.taken_s
    ttfts = sorted(s.ttft_s for s in served)
    route_s = taken_s / len(served)
    return {
        "requests": len(served),
        "requests/s": shape.requests_per_s,
        "TTFT, mean, s": statistics.fmean(ttfts),
        "TTFT, 90th percentile, s": ttfts[int(0.9 * len(ttfts))],
        "ITL, s": statistics.fmean(s.itl_s for s in served),
        "of prompts cached": sum(s.num_cached for s in served) / sum(s.num_prompt for s in served),
        "a route is chosen, ms": route_s * 1000,
        "processors that choose routes": route_s * shape.requests_per_s,
    }


def _workers(number: int, block_nbytes: int) -> list[WorkerSpec]:
    limits = Limits(block_size=16, context_length=8192)
    roles = (Role.DECODE, Role.PREFILL)
    return [WorkerSpec(f"w{n}", roles[n % 2], NUM_BLOCKS, block_nbytes, limits) for n in range(number)]
