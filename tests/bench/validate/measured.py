"""What was measured: steps of the engine, lone requests, and loads.  Kept as JSON, so that what simulates them can be run
again on the same figures."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvferry.aio import AsyncClient
from kvferry.bench.doors import GrpcDoor
from kvferry.bench.record import Record
from kvferry.bench.runner import Runner
from kvferry.bench.workload import Ask
from kvferry.cli.step_sums import between, sums_of, workers_of
from services.planner.calibrate.fit import fit_sums, spread_of
from services.planner.calibrate.steps import ROUND_TRIP_S, TRANSFER_BYTES_PER_S
from services.planner.hardware import Measured
from services.planner.simulator.cost_model import CostModel
from tests.bench.split.fleets import MAX_OPEN, TIMEOUT_S, Fleet
from tests.bench.system.systems import ROOT
from tests.bench.validate.load import Due, schedule

T = TypeVar("T")

REPORTED_S = 4.0  # until the gateway has heard of the last step
# Lone requests: (streams at once, prompt, answer, how often).  None is of a load.
PROBES = ((1, 256, 2, 6), (1, 64, 48, 3), (8, 64, 48, 1))
CALIBRATION_S = 300.0
KV_NBYTES = 1 << 30  # of each worker's pool, as tests.bench.split.fleets starts it


@dataclass(frozen=True, slots=True)
class Probe:
    """``costs``: fitted to its own steps."""

    num_streams: int
    num_prompt: int
    num_output: int
    records: tuple[Record, ...]
    costs: CostModel


@dataclass(frozen=True, slots=True)
class Loaded:
    """``costs``: fitted to the steps that its workers computed meanwhile."""

    rate: float
    dues: tuple[Due, ...]
    records: tuple[Record, ...]
    costs: CostModel


@dataclass(frozen=True, slots=True)
class FleetFound:
    fleet: Fleet
    probes: tuple[Probe, ...]
    loads: tuple[Loaded, ...]


def calibrated_together(rounds: int) -> list[dict[str, Any]]:
    """`kvferry calibrate`'s documents, of each core while the other is computing the same: workers share the bandwidth of
    the memory."""
    own = os.sched_getaffinity(0)
    running = []
    for core in sorted(own):
        os.sched_setaffinity(0, {core})  # which the child inherits
        command = [sys.executable, "-m", "services.planner.calibrate", "--rounds", str(rounds)]
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
        )
    os.sched_setaffinity(0, own)
    try:
        return [json.loads(process.communicate(timeout=CALIBRATION_S)[0]) for process in running]
    finally:
        for process in running:
            process.kill()


def costs_of(calibrations: Sequence[dict[str, Any]]) -> Measured:
    """The mean of each price."""
    each = [calibration["costs"] for calibration in calibrations]
    mean = {name: sum(costs[name] for costs in each) / len(each) for name in each[0]}
    block_nbytes, block_size = calibrations[0]["block_nbytes"], calibrations[0]["block_size"]
    return Measured(CostModel(**mean), block_nbytes, block_size, KV_NBYTES // block_nbytes * block_size)


async def probe(address: str, probes: Sequence[tuple[int, int, int, int]] = PROBES) -> list[Probe]:
    found = []
    for number, (num_streams, num_prompt, num_output, times) in enumerate(probes):
        dues, seed = [(0.0, Ask(0.0, num_prompt, num_output))] * num_streams, 1_000_000 + 1000 * number
        await send(address, dues, seed)  # warms up
        records, costs = await in_service(address, _in_turn(address, dues, seed + 1, times))
        found.append(Probe(num_streams, num_prompt, num_output, tuple(records), costs))
    return found


async def _in_turn(address: str, dues: Sequence[Due], seed: int, times: int) -> list[Record]:
    return [record for turn in range(times) for record in await send(address, dues, seed + turn)]


async def in_service(address: str, work: Awaitable[T]) -> tuple[T, CostModel]:
    """What ``work`` comes to, and what the steps cost that were computed for it."""
    async with AsyncClient(address, max_attempts=1) as client:
        await asyncio.sleep(REPORTED_S)
        before = sums_of(workers_of(await client.cluster(), ()))
        done = await work
        await asyncio.sleep(REPORTED_S)
        workers = workers_of(await client.cluster(), ())
    sums = between(before, sums_of(workers))
    assert sums is not None, "somebody computed"
    found = fit_sums(sums.seconds, sums.shares, sums.ratios, sums.products, sums.squares)
    rates = [worker.transfer_bytes_per_s for worker in workers if worker.transfer_bytes_per_s]
    return done, CostModel(
        *found.prices, ROUND_TRIP_S, max(rates, default=TRANSFER_BYTES_PER_S), spread_of(sums.scatter, found)
    )  # fmt: skip


async def send(address: str, dues: Sequence[Due], seed: int) -> list[Record]:
    async with AsyncClient(address, max_attempts=1) as client:
        door = GrpcDoor(client)
        vocab_size = (await door.target()).vocab_size
        runner = Runner(door, max_open=MAX_OPEN, closed=False, timeout_s=TIMEOUT_S)
        outcome = await runner.run(schedule(dues, vocab_size, seed))
    return sorted(outcome.records, key=lambda record: record.scheduled_s)


def measure(
    fleet: Fleet, loads: Callable[[Sequence[Probe], CostModel], Sequence[tuple[float, list[Due]]]], seed: int
) -> FleetFound:
    """``loads`` is told what lone requests took, and gives rates and what is asked.  Raises ClusterError."""
    found = []
    with fleet.running() as address:
        probes, costs = asyncio.run(in_service(address, probe(address)))
        for number, (rate, dues) in enumerate(loads(probes, costs)):
            records, load_costs = asyncio.run(in_service(address, send(address, dues, seed + number)))
            found.append(Loaded(rate, tuple(dues), tuple(records), load_costs))
    return FleetFound(fleet, tuple(probes), tuple(found))


def write(path: Path, calibrations: Sequence[dict[str, Any]], found: Sequence[FleetFound]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"calibrations": calibrations, "fleets": [asdict(each) for each in found]}))


def read(path: Path) -> tuple[list[dict[str, Any]], list[FleetFound]]:
    document = json.loads(path.read_text())
    return document["calibrations"], [_fleet(each) for each in document["fleets"]]


def _fleet(read: dict[str, Any]) -> FleetFound:
    probes = tuple(
        Probe(**{**each, "records": _records(each), "costs": CostModel(**each["costs"])}) for each in read["probes"]
    )
    loads = tuple(
        Loaded(
            each["rate"],
            tuple((at_s, Ask(**ask)) for at_s, ask in each["dues"]),
            _records(each),
            CostModel(**each["costs"]),
        )
        for each in read["loads"]
    )
    return FleetFound(Fleet(**read["fleet"]), probes, loads)


def _records(read: dict[str, Any]) -> tuple[Record, ...]:
    return tuple(Record(**{**each, "token_at_s": tuple(each["token_at_s"])}) for each in read["records"])
