"""A workload that turns from prompts to answers: roles follow it, by virtual time and so always in the same way."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from gateway.candidates import Role
from gateway.routing import Policy
from services.engine.scheduler import Limits
from services.planner.online.decider import Terms
from services.planner.simulator.arrivals import Arrival, Served
from services.planner.simulator.autoscaler import Autoscaler
from services.planner.simulator.cluster import Cluster
from services.planner.simulator.cost_model import CostModel
from services.planner.simulator.worker import WorkerSpec

COSTS = CostModel(0.01, 0.001, 1e-8, 0.002, 1e-6, 0.001, 1e9)
NUM_WORKERS, HALF_S = 4, 90.0
TTFT_S, ITL_S = 4.0, 0.06


def half(name: str, begin_s: float, rate: float, num_prompt: int, num_output: int) -> list[Arrival]:
    random, at_s, arrivals = Random(name), begin_s, list[Arrival]()
    while (at_s := at_s + random.expovariate(rate)) < begin_s + HALF_S:
        first = random.randrange(1 << 16)
        prompt = tuple((first + 7 * n) % (1 << 16) for n in range(num_prompt))
        arrivals.append(Arrival(f"{name}{len(arrivals)}", at_s, prompt, num_output))
    return arrivals


PROMPTS = half("p", 0.0, 2.2, 1000, 20)
ANSWERS = half("a", HALF_S, 2.0, 40, 400)


def split(num_prefill: int) -> Cluster:
    limits = Limits(block_size=16, context_length=8192)
    roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * (NUM_WORKERS - num_prefill)
    specs = [WorkerSpec(f"w{n}", role, 4000, 300_000, limits) for n, role in enumerate(roles)]
    return Cluster(specs, COSTS, Policy.KV_AWARE)


def num_good(served: Iterable[Served]) -> int:
    return sum(s.ttft_s <= TTFT_S and s.itl_s <= ITL_S for s in served)


def test_roles_that_follow_a_turn_keep_nine_tenths_of_all_requests_good_which_the_first_split_does_not() -> None:
    """No split can have more than all: it is nine tenths of the best static one's goodput for either half, and more."""
    cluster = split(2)
    autoscaler = Autoscaler(cluster, Terms(itl_s=0.8 * ITL_S), every_s=1.0, until_s=2 * HALF_S)
    served = cluster.run([*PROMPTS, *ANSWERS])
    cluster.check_integrity()
    for name, load in (("p", PROMPTS), ("a", ANSWERS)):
        assert num_good(s for s in served if s.id.startswith(name)) >= 0.9 * len(load)
    roles = [decision.step.role for _, decision in autoscaler.decisions if decision.step is not None]
    assert roles == [Role.PREFILL, Role.DECODE, Role.DECODE]
    assert num_good(split(2).run(ANSWERS)) < 0.9 * len(ANSWERS)
