"""The same fleets and loads in virtual time: by the coarse simulator, which `kvferry plan` uses, and by the fine one,
around the real schedulers and routing.  Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gateway.candidates import Role
from gateway.routing import Policy
from kvferry.bench.record import Record
from kvferry.bench.slo import Slo
from services.engine.scheduler import Limits
from services.planner import fleet as coarse
from services.planner.fleet import Link, Pool
from services.planner.hardware import Measured
from services.planner.simulator.arrivals import Arrival
from services.planner.simulator.cluster import Cluster, ViewDelays
from services.planner.simulator.cost_model import CostModel
from services.planner.simulator.worker import WorkerSpec
from services.planner.sizing import attained
from services.planner.step_cost import batch, calibrated, chunk
from services.planner.traffic import Traffic
from tests.bench.split.fleets import Fleet
from tests.bench.validate.load import MOST_TOKENS, Due
from tests.bench.validate.measured import Probe

MAX_RUNNING = 64


@dataclass(frozen=True, slots=True)
class Serving:
    """What lone requests take beside the engine's steps: ``door_s`` from a client to a worker's first step and from its end
    back, most of it between gateway and worker; ``handover_s`` from the end of a prompt on one worker to the first step on
    another."""

    door_s: float
    handover_s: float

    def at(self, costs: CostModel) -> CostModel:
        return replace(costs, round_trip_s=self.handover_s / 2)


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds; ``good``: share of the requests that keep the objectives."""

    ttft_p50: float
    ttft_p90: float
    itl_p50: float
    itl_p90: float
    good: float


def serving(probes: Sequence[Probe], fleet: Fleet) -> Serving:
    """By the first, of lone requests, and what its own steps cost: a line through other steps too may be off by more."""
    first = probes[0]
    engine = calibrated(first.costs)
    begins = range(0, first.num_prompt, fleet.chunk_tokens)
    prompt_s = sum(engine.step_s(chunk(min(fleet.chunk_tokens, first.num_prompt - at), at)) for at in begins)
    ttft_s = statistics.median(r.ttft_s for r in first.records if r.ttft_s is not None)
    handover_s = 0.0
    if fleet.num_prefill:
        second_s = statistics.median(record.gaps_s[0] for record in first.records)
        handover_s = max(0.0, second_s - engine.step_s(batch(1, first.num_prompt)))
    return Serving(max(0.0, ttft_s - prompt_s), handover_s)


def by_plan(fleet: Fleet, measured: Measured, served: Serving, dues: Sequence[Due], slo: Slo) -> Figures:
    costs = served.at(measured.costs)
    cost = calibrated(costs)
    decode = Pool(
        fleet.num_decode, cost, fleet.chunk_tokens, measured.kv_tokens, MAX_RUNNING, mixed_tokens=fleet.mixed_tokens
    )
    made = coarse.Fleet(decode, gateway=coarse.Gateway(dispatch_s=served.door_s))
    if fleet.num_prefill:
        rate = costs.transfer_bytes_per_s
        prefill = Pool(fleet.num_prefill, cost, fleet.chunk_tokens, measured.kv_tokens, MAX_RUNNING)
        made = replace(made, prefill=prefill, link=Link(measured.kv_token_nbytes, rate, rate, costs.round_trip_s))
    traffic = Traffic(
        np.array([at_s for at_s, _ in dues]), np.array([ask.num_prompt_tokens for _, ask in dues], np.int32),
        np.array([ask.num_output_tokens for _, ask in dues], np.int32), np.zeros(len(dues), np.int32),
    )  # fmt: skip
    run = coarse.simulate(made, traffic, slo.itl if slo.itl is not None else float("inf"))
    ttft_p50, ttft_p90 = (float(np.percentile(run.ttft_s, rank)) for rank in (50, 90))
    return Figures(ttft_p50, ttft_p90, run.itl_s(50), run.itl_s(90), attained(run, slo).all)


def by_cores(fleet: Fleet, measured: Measured, served: Serving, dues: Sequence[Due], slo: Slo) -> Figures:
    """The real routing and scheduling."""
    limits = Limits(measured.block_size, 2 * MOST_TOKENS, fleet.chunk_tokens, fleet.mixed_tokens, MAX_RUNNING)
    roles = [Role.PREFILL] * fleet.num_prefill + [Role.DECODE] * fleet.num_decode
    num_blocks = measured.kv_tokens // measured.block_size
    specs = [
        WorkerSpec(f"w{number}", role, num_blocks, measured.block_nbytes, limits) for number, role in enumerate(roles)
    ]
    cluster = Cluster(specs, served.at(measured.costs), Policy.KV_AWARE, ViewDelays(dispatch_s=served.door_s))
    answered = cluster.run(
        Arrival(f"r{number}", at_s, tuple(range(1000 * number, 1000 * number + ask.num_prompt_tokens)),
                ask.num_output_tokens)
        for number, (at_s, ask) in enumerate(dues)
    )  # fmt: skip
    cluster.check_integrity()
    return of_records(
        [Record(s.arrived_s, s.arrived_s, s.ended_s, s.num_prompt, tuple(s.token_at_s)) for s in answered],
        slo,
    )


def of_records(records: Sequence[Record], slo: Slo) -> Figures:
    """Raises ValueError where nothing was answered."""
    whole = [record for record in records if record.error is None]
    if not whole:
        raise ValueError(f"none of {len(records)} requests was answered")
    ttfts = [record.ttft_s for record in whole if record.ttft_s is not None]
    gaps = [gap for record in whole for gap in record.gaps_s]
    good = sum(map(slo.is_met_by, records)) / len(records)
    return Figures(
        *(float(np.percentile(ttfts, rank)) for rank in (50, 90)), *(float(np.percentile(gaps, r)) for r in (50, 90)),
        good,
    )  # fmt: skip
