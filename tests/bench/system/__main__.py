"""make bench-system: mixed streams through gateway, gRPC and workers, against the same work given to the engine alone.

The engine alone runs in one process without gRPC, with the same limits and as many threads as each worker.  Clients,
gateway and workers share the machine.  The systems stay up and take turns; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack

from rich.console import Console
from rich.progress import track

from tests.bench.system import gaps
from tests.bench.system.mix import mix, num_tokens
from tests.bench.system.systems import ROOT, Alone, System, Through
from tests.bench.terminal import require_parts, say
from tests.bench.transport.report import table, write_json
from tests.bench.transport.rows import Row, more_is_better, within

OUT = ROOT / "build" / "bench" / "system.json"
RATE_GOAL = 0.9
GAP_MS = 1.0
ALONE, COMBINED, SPLIT = "engine alone", "one worker", "prefill + decode"


def main() -> None:
    options = parse()
    console = Console()
    say(
        console,
        f"{options.streams} streams; {options.dtype}, threads: {options.threads}, in the engine alone and each worker",
    )
    names = [ALONE, *(name for name in (COMBINED, SPLIT) if any(part in name for part in options.only))]
    with ExitStack() as stack:
        systems = {name: stack.enter_context(system(name, options)) for name in names}
        rates, found = measure(console, systems, options)
    rows = [
        more_is_better(f"{options.streams} streams, {name} / alone", rates[name], rates[ALONE], RATE_GOAL, "tokens/s")
        for name in names[1:]
    ]
    for name in names:
        p99_ms = [1e3 * gaps.quantile(counts, 0.99) for counts in found[name]]
        rows.append(within(f"gap between steps p99, {name} / allowed", p99_ms, GAP_MS, "ms"))
    report(console, rows, options)


def system(name: str, options: argparse.Namespace) -> System:
    if name == ALONE:
        return Alone(options.dtype, options.threads)
    return Through(name.replace(" ", "-"), options.dtype, options.threads, num_prefill=int(name == SPLIT))


def measure(
    console: Console, systems: dict[str, System], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """By system and round: tokens per second, and the gaps by bucket."""
    rates: dict[str, list[float]] = {name: [] for name in systems}
    found: dict[str, list[list[int]]] = {name: [] for name in systems}
    for number in track(range(-1, options.rounds), "rounds", console=console):
        asks = mix(options.streams, options.seed + number)
        order = list(systems) if number % 2 else list(reversed(systems))
        for name in order:
            seconds, counts = systems[name].run(asks)
            if number >= 0:  # the first round opens connections
                rates[name].append(num_tokens(asks) / seconds)
                found[name].append(counts)
    return rates, found


def report(console: Console, rows: list[Row], options: argparse.Namespace) -> None:
    console.print(table(rows))
    write_json(rows, OUT)
    load, cores = os.getloadavg()[0], os.cpu_count()
    say(console, f"medians of {options.rounds} rounds, taken in turn; {cores} cores, load average {load:.1f}")
    say(console, "nothing is pinned: clients, gateway and workers run on any core")
    say(console, f"wrote {OUT.relative_to(ROOT)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.system", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="that count of each (default: 5)")
    parser.add_argument("--streams", type=int, default=32, help="at the same time (default: 32)")
    shared_out = max(1, (os.cpu_count() or 1) // 2)
    what = "of each engine (default: half of the cores, as kvferry serve gives each of two workers)"
    parser.add_argument("--threads", type=int, default=shared_out, help=what)
    parser.add_argument("--dtype", default="bfloat16", help="of weights and KV (default: bfloat16)")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and lengths (default: 1)")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="PART", help=f"by part of a name: {COMBINED}, {SPLIT}"
    )
    options = parser.parse_args()
    for name in ("rounds", "streams", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} takes 1 or more")
    require_parts(parser, "system", options.only, (COMBINED, SPLIT))
    return options


if __name__ == "__main__":
    main()
