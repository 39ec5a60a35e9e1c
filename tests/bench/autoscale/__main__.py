"""make bench-autoscale: a load that turns from prompts to answers, on workers whose roles follow and on each static split.

The same arrivals, with the real model: halves of long prompts with short answers, then of short prompts with long answers.
A half's goodput counts all that was due in it, from its first second on, while roles are still those of the half before.
The goal is nine tenths of what the best static split of as many workers has in that half.  Each worker has a part of the
processors to itself, see quota.py.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from kvferry.bench.record import Record, percentile
from kvferry.bench.slo import Slo
from kvferry.bench.workload import Ask
from tests.bench.autoscale.fleets import Fleet, measure, saturate
from tests.bench.autoscale.load import Half, Turn
from tests.bench.autoscale.quota import NoQuota, limited
from tests.bench.system.systems import ROOT
from tests.bench.terminal import say
from tests.bench.transport.report import table, write_json
from tests.bench.transport.rows import Row, more_is_better

OUT = ROOT / "build" / "bench" / "autoscale.json"
GOAL = 0.9
PLANNER = "--window-s 5 --patience 2 --cooldown-s 5 --look-every-s 0.5 --log-level debug"


@dataclass(frozen=True, slots=True)
class Found:
    """Of one half; ``goodput`` in requests/s, times in seconds, of the requests that were answered."""

    goodput: float
    attained: float
    ttft_p50_s: float
    ttft_p90_s: float
    itl_p50_s: float
    itl_p99_s: float
    num_failed: int


def found_in(records: Sequence[Record], objectives: Slo, seconds: float) -> Found:
    """Times are infinite where nothing was answered."""
    whole = [record for record in records if record.error is None]
    ttfts = sorted(ttft for record in whole if (ttft := record.ttft_s) is not None) or [math.inf]
    gaps = sorted(gap for record in whole for gap in record.gaps_s) or [math.inf]
    good = sum(map(objectives.is_met_by, whole))
    return Found(
        good / seconds, good / max(1, len(records)), percentile(ttfts, 50), percentile(ttfts, 90), percentile(gaps, 50),
        percentile(gaps, 99), len(records) - len(whole),
    )  # fmt: skip


def main() -> None:
    options = parse()
    console, workers = Console(), options.workers
    cores = quota(console, workers) if options.cores is None else options.cores or None
    prompt, answer = Ask(0.0, options.prompt_tokens, 16), Ask(0.0, 48, options.answer_tokens)
    statics = [Fleet(f"{n}+{workers - n}", n, workers - n) for n in range(1, workers)]
    prompt_rate, answer_rate, gap_s = options.prompt_rate, options.answer_rate, options.tpot_s
    if prompt_rate is None or answer_rate is None or gap_s is None:
        with statics[-1].running(cores) as address:
            done = saturate(address, prompt, 2 * workers, options.look_seconds)
            prompt_rate = options.load * served(done, prompt) / options.look_seconds
        with statics[0].running(cores) as address:
            done = saturate(address, answer, options.streams, options.look_seconds)
            answer_rate = options.load * served(done, answer) / options.look_seconds
            gap_s = options.slack * statistics.median(gap for record in done for gap in record.gaps_s)
    say(console, f"prompts {prompt_rate:.2f}/s, answers {answer_rate:.2f}/s, TPOT within {1e3 * gap_s:.0f} ms")
    objectives = Slo(ttft=options.ttft_s, tpot=gap_s)
    turn = Turn(Half("prompts", prompt_rate, prompt), Half("answers", answer_rate, answer), options.seconds)
    follows = (options.ttft_s, 0.8 * gap_s, tuple(PLANNER.split()))
    adaptive = Fleet("autoscale", options.begin_with, workers - options.begin_with, follows)
    found: dict[str, list[tuple[Found, Found]]] = {}
    for fleet in [adaptive, *statics]:
        if options.only and fleet.name not in options.only:
            continue
        found[fleet.name] = []
        for seed in range(options.seed, options.seed + options.rounds):
            with fleet.running(cores) as address:
                records = measure(address, turn, seed)
            first, second = (found_in(turn.of(half, records), objectives, turn.half_s) for half in turn.halves)
            found[fleet.name].append((first, second))
            say(console, f"{fleet.name}: prompts {told(first)}; answers {told(second)}")
    console.print(figures(found))
    if not options.only:
        rows = rows_of(found, adaptive.name)
        console.print(table(rows))
        write_json(rows, OUT)
        say(console, f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; wrote {OUT.relative_to(ROOT)}")


def quota(console: Console, workers: int) -> float | None:
    """Of each worker: four fifths of the processors, the rest for gateway, directory and clients."""
    cores = 0.8 * len(os.sched_getaffinity(0)) / workers
    somebody = subprocess.Popen(["sleep", "60"])
    try:
        with limited([somebody.pid], cores):
            pass
    except NoQuota as error:
        say(console, f"workers share all processors: {error}")
        return None
    finally:
        somebody.kill()
        somebody.wait()
    say(console, f"each worker has {cores:.2f} cores")
    return cores


def served(records: Sequence[Record], ask: Ask) -> float:
    """How many requests, parts of answers included."""
    return sum(len(record.token_at_s) for record in records) / ask.num_output_tokens


def rows_of(found: dict[str, list[tuple[Found, Found]]], adaptive: str) -> list[Row]:
    """In each half against that split which was best in it over all rounds, chosen afterwards."""
    rows = []
    for index, half in enumerate(("prompts", "answers")):
        good = {name: [pair[index].goodput for pair in rounds] for name, rounds in found.items()}
        best = max((name for name in found if name != adaptive), key=lambda name: sum(good[name]))
        work = f"{half}: goodput, roles that follow / best static split ({best})"
        rows.append(more_is_better(work, good[adaptive], [max(g, 1e-3) for g in good[best]], GOAL, "requests/s"))
    return rows


def told(found: Found) -> str:
    return (
        f"good {found.goodput:.2f}/s ({found.attained:.0%}), "
        f"TTFT p50 {found.ttft_p50_s:.2f}, p90 {found.ttft_p90_s:.2f} s, "
        f"ITL p50 {1e3 * found.itl_p50_s:.0f}, p99 {1e3 * found.itl_p99_s:.0f} ms, failed {found.num_failed}"
    )


def figures(found: dict[str, list[tuple[Found, Found]]]) -> Table:
    drawn = Table("fleet", "prompts: good/s", "good", "answers: good/s", "good", "failed")
    for name, rounds in found.items():
        for first, second in rounds:
            drawn.add_row(
                name, f"{first.goodput:.2f}", f"{first.attained:.0%}", f"{second.goodput:.2f}",
                f"{second.attained:.0%}", str(first.num_failed + second.num_failed),
            )  # fmt: skip
    return drawn


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-autoscale", description=__doc__)
    parser.add_argument("--workers", type=int, default=4, help="of both roles together (default: %(default)s)")
    parser.add_argument(
        "--cores", type=float, help="of each worker; 0: all share all (default: 0.8 of them, shared out)"
    )
    parser.add_argument("--begin-with", type=int, default=2, help="prefill workers at first (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=768, help="of the first half (default: %(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=128, help="of the second half (default: %(default)s)")
    parser.add_argument("--load", type=float, default=0.7, help="of what the best split of each half does at most")
    parser.add_argument("--streams", type=int, default=8, help="answers at once while that is looked at")
    parser.add_argument("--look-seconds", type=float, default=12.0, help="how long it is looked at, for each half")
    parser.add_argument("--prompt-rate", type=float, help="requests a second of the first half, not looked at")
    parser.add_argument("--answer-rate", type=float, help="of the second half")
    parser.add_argument("--ttft-s", type=float, default=3.0, help="what a good request keeps (default: %(default)s)")
    parser.add_argument("--tpot-s", type=float, help="likewise; by default --slack times what was looked at")
    parser.add_argument("--slack", type=float, default=1.8, help="see there (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=45.0, help="of each half (default: %(default)s)")
    parser.add_argument("--planner", default=PLANNER, help="more flags of the planner")
    parser.add_argument("--only", nargs="*", default=[], help="fleets by name, for a look; writes nothing")
    parser.add_argument("--rounds", type=int, default=1, help="of each fleet, with the seeds from --seed on")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
