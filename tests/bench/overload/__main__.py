"""make bench-overload: what is left of a cluster's goodput under three times the load that it sustains.

First the rate rises until it is twice what is served well: the highest goodput on the way is the peak, and what the cluster
sustains.  Then three times that comes, for two minutes: requests are refused, and the question is how many good ones are
left, how soon the others hear of it, and whose memory grows.  At last a tenant that asks for little comes beside one that
floods.

A request is good that keeps the objectives, counted from when it was due, by the second of the load in which it was due.
Clients, gateway, directory and both workers share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from zlib import crc32

from rich.console import Console

from kvferry.aio import AsyncClient
from kvferry.bench import lengths, slo
from kvferry.bench.doors import GrpcDoor
from kvferry.bench.load import Load
from kvferry.bench.record import Record, percentile
from kvferry.bench.runner import Runner
from kvferry.bench.slo import Slo
from tests.bench.overload.memory import Memory
from tests.bench.overload.refusals import NotingDoor
from tests.bench.overload.system import KEYS, System, running
from tests.bench.system.systems import ROOT
from tests.bench.terminal import say
from tests.bench.transport.report import table, write_json
from tests.bench.transport.rows import Row, more_is_better, within

OUT = ROOT / "build" / "bench" / "overload.json"
TIMEOUT_S = 60.0
MAX_OPEN = 2000
RISE = 1.6
BEYOND = 2.0
GOOD_SHARE = 0.9
TIMES = 3
GOODPUT_GOAL = 0.9
REFUSED_WITHIN_S = 0.5
GROWTH_ALLOWED = 1.05
MODEST_SHARE = 0.2  # of the sustainable rate


@dataclass(frozen=True, slots=True)
class Found:
    """Of one load of one tenant; ``goodput`` in requests/s over the seconds in which they were due."""

    offered: int
    good: int
    goodput: float
    ttfts_s: tuple[float, ...]  # of whole answers; ascending, as the next
    refused_after_s: tuple[float, ...]
    num_hints: int
    num_late: int  # of whole answers: those whose first token came too late
    errors: Counter[str]

    def __str__(self) -> str:
        parts = [f"{self.offered} requests, {self.good} good, {self.goodput:.2f}/s"]
        num_whole = self.offered - self.errors.total()
        parts.append(f"late {self.num_late}, only slow {num_whole - self.good - self.num_late}")
        if ttfts := self.ttfts_s:
            parts.append(f"TTFT p50 {percentile(ttfts, 50):.2f}, p99 {percentile(ttfts, 99):.2f} s")
        if after := self.refused_after_s:
            parts.append(
                f"refused after p50 {1e3 * percentile(after, 50):.0f}, p99 {1e3 * percentile(after, 99):.0f} ms"
            )
        parts += [f"{name} {count}" for name, count in self.errors.items()]
        return ", ".join(parts)


def found_in(records: Sequence[Record], hints_s: Sequence[float | None], objectives: Slo, seconds: float) -> Found:
    whole = [record for record in records if record.error is None]
    good = sum(map(objectives.is_met_by, whole))
    ttft_only = Slo(ttft=objectives.ttft)
    return Found(
        len(records), good, good / seconds,
        tuple(sorted(ttft for record in whole if (ttft := record.ttft_s) is not None)),
        tuple(sorted(record.e2e_s for record in records if record.refused)),
        sum(hint is not None and hint > 0 for hint in hints_s),
        sum(not ttft_only.is_met_by(record) for record in whole),
        Counter(record.error for record in records if record.error is not None),
    )  # fmt: skip


class Bench:
    def __init__(self, system: System, objectives: Slo, console: Console) -> None:
        self._system = system
        self._objectives = objectives
        self._console = console

    async def load(self, name: str, rates: dict[str, float], seconds: float) -> dict[str, Found]:
        """By tenant, each of which comes at its rate.  All answered or failed at the end."""
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            tasks = {}
            for tenant, rate in rates.items():
                client = AsyncClient(self._system.address, api_key=KEYS[tenant], max_attempts=1)
                door = NotingDoor(GrpcDoor(await stack.enter_async_context(client)))
                tasks[tenant] = group.create_task(self._load_of_one(f"{name} {tenant}", door, rate, seconds))
        found = {tenant: task.result() for tenant, task in tasks.items()}
        for tenant, each in found.items():
            say(self._console, f"{name}: {tenant} at {rates[tenant]:.2f}/s: {each}")
        return found

    async def _load_of_one(self, name: str, door: NotingDoor, rate: float, seconds: float) -> Found:
        seed = crc32(f"{name} {rate}".encode())  # so that no load finds another's prompts in the caches
        load = Load(
            rate=rate, burstiness=1.0, concurrency=None, trace=(), speed=1.0, conversations=(),
            prompt=lengths.parse("uniform:48:256"), output=lengths.parse("uniform:16:64"), seed=seed, warmup_s=0.0,
            duration_s=seconds, num_requests=None, timeout_s=TIMEOUT_S,
        )  # fmt: skip
        target = await door.target()
        runner = Runner(door, max_open=MAX_OPEN, closed=False, timeout_s=TIMEOUT_S)
        outcome = await runner.run(load.schedule(target.vocab_size, target.context_length))
        return found_in(outcome.records, door.hints_s, self._objectives, seconds)


async def measure(system: System, options: argparse.Namespace, objectives: Slo, console: Console) -> list[Row]:
    bench = Bench(system, objectives, console)
    await bench.load("warm", {"flooding": options.start}, options.seconds)
    rate, peak = options.start, 0.0
    while rate <= max(BEYOND * peak, options.start * BEYOND):
        found = (await bench.load("rising", {"flooding": rate}, options.seconds))["flooding"]
        peak = max(peak, found.goodput)
        rate *= RISE
    if peak == 0:
        raise RuntimeError("no request was good at any rate; begin with a lower --start, or ask for less with --slo")
    say(console, f"sustainable: {peak:.2f} requests/s")
    memory = Memory(system.pids)
    watching = asyncio.create_task(memory.watch())
    over = (await bench.load("overload", {"flooding": TIMES * peak}, options.overload_seconds))["flooding"]
    watching.cancel()
    modest_rate = {"modest": MODEST_SHARE * peak}
    alone = (await bench.load("alone", modest_rate, options.tenant_seconds))["modest"]
    beside = await bench.load("beside", {"flooding": TIMES * peak, **modest_rate}, options.tenant_seconds)
    return [
        *rows_of(peak, over, memory, objectives),
        *rows_of_tenants(alone, beside["modest"], beside["flooding"], objectives),
    ]


def rows_of(peak: float, over: Found, memory: Memory, objectives: Slo) -> list[Row]:
    refused = over.refused_after_s
    rows = [more_is_better(f"goodput at {TIMES}x / its peak", [over.goodput], [peak], GOODPUT_GOAL, "requests/s")]
    if refused:
        rows += [
            within("refused after, p50 / half a second", [percentile(refused, 50)], REFUSED_WITHIN_S, "s"),
            within("refused after, p99 / TTFT objective", [percentile(refused, 99)], objectives.ttft or 0.0, "s"),
            more_is_better("refusals with a hint / all", [over.num_hints], [len(refused)], 1.0, "requests"),
        ]
    for name in memory.mib:
        early_mib, late_mib = memory.early_and_late_mib(name)
        rows.append(within(f"{name}: late / early memory", [late_mib], GROWTH_ALLOWED * early_mib, "MiB"))
    failed = sum(over.errors.values()) - len(refused)
    rows.append(more_is_better("good or refused / all", [over.offered - failed], [over.offered], 1.0, "requests"))
    return rows


def rows_of_tenants(alone: Found, modest: Found, flooding: Found, objectives: Slo) -> list[Row]:
    rows = [
        more_is_better("modest beside a flood: good / asked", [modest.good], [modest.offered], GOOD_SHARE, "requests")
    ]
    if alone.ttfts_s and modest.ttfts_s:
        (before, beside) = (percentile(found.ttfts_s, 50) for found in (alone, modest))
        rows.append(within("modest beside a flood: p50 TTFT / objective", [beside], objectives.ttft or 0.0, "s"))
        rows.append(more_is_better("modest: p50 TTFT alone / beside a flood", [before], [beside], 0.0, "s"))
    rows.append(more_is_better("the flood: good / asked", [flooding.good], [flooding.offered], 0.0, "requests"))
    return rows


def main() -> None:
    options = parse()
    console, objectives = Console(), slo.parse(options.slo)
    with running(objectives) as system:
        rows = asyncio.run(measure(system, options, objectives, console))
    console.print(table(rows))
    write_json(rows, OUT)
    say(console, f"{options.slo}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; wrote {OUT.relative_to(ROOT)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-overload", description=__doc__)
    parser.add_argument("--slo", default="ttft=2s,itl=200ms", help="what a good request keeps (default: %(default)s)")
    parser.add_argument("--start", type=float, default=1.0, help="the first rate (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each rate (default: %(default)s)")
    parser.add_argument("--overload-seconds", type=float, default=120.0, help="(default: %(default)s)")
    parser.add_argument("--tenant-seconds", type=float, default=60.0, help="of the two loads of tenants")
    return parser.parse_args()


if __name__ == "__main__":
    main()
