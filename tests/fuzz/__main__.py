"""Each target in turn, in a process of its own, guided by coverage: python -m tests.fuzz --seconds 600 [--only gguf]"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz import sanitized
from tests.fuzz.target import Target
from tests.fuzz.targets import MODULES, TARGETS

BUILD = Path(__file__).parents[2] / "build" / "fuzz"
NUM_SEEDS = 200
# Of one case; whoever takes longer hangs.
HANG_S = 20
MEMORY_MBYTES = 2048
# To start, to read what earlier runs kept and to end, beside the time to fuzz.
GRACE_S = 180
SHOWN_LINES = 60


@dataclass(frozen=True, slots=True)
class Outcome:
    num_cases: int
    num_taken: int
    elapsed_s: float
    edges: str
    finding: str | None


def main() -> int:
    names = [target.name for target in TARGETS]
    parser = argparse.ArgumentParser(prog="make fuzz", description=f"Targets: {', '.join(names)}.")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all targets together")
    parser.add_argument("--cases", type=int, help="for each target, whatever its time")
    parser.add_argument("--only", choices=names, metavar="TARGET")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path, help="read this file alone, with --only")
    options = parser.parse_args()
    if options.replay and not options.only:
        parser.error("--replay wants --only TARGET")
    targets = [target for target in TARGETS if options.only in (None, target.name)]
    outcomes = {}
    print(f"{'target':20} {'cases':>10} {'taken':>10} {'seconds':>8} {'a second':>9} {'edges':>6}")
    for target in targets:
        if options.replay:
            outcome = _run(target, [str(options.replay)], HANG_S)
        else:
            seconds = options.seconds / len(targets)
            amount = [f"-runs={options.cases}"] if options.cases else [f"-max_total_time={max(1, round(seconds))}"]
            outcome = _fuzz(target, options.seed, amount, options.cases or seconds)
        outcomes[target.name] = outcome
        rate = outcome.num_cases / outcome.elapsed_s
        print(f"{target.name:20} {outcome.num_cases:>10} {outcome.num_taken:>10} {outcome.elapsed_s:>8.0f} {rate:>9.0f} "
              f"{outcome.edges:>6}  {'FOUND' if outcome.finding else 'ok'}", flush=True)  # fmt: skip
    cases, taken = (sum(getattr(o, name) for o in outcomes.values()) for name in ("num_cases", "num_taken"))
    print(f"{'in all':20} {cases:>10} {taken:>10} "
          f"{sum(o.elapsed_s for o in outcomes.values()):>8.0f}")  # fmt: skip
    for name, outcome in outcomes.items():
        if outcome.finding:
            print(f"\n{name}: {outcome.finding}")
    return any(outcome.finding for outcome in outcomes.values())


def _fuzz(target: Target, number: int, amount: Sequence[str], patience_s: float) -> Outcome:
    folder = BUILD / target.name
    seeds, kept = folder / "seeds", folder / "kept"
    for directory in (seeds, kept):
        directory.mkdir(parents=True, exist_ok=True)
    for data in seeds_of(target, number):
        (seeds / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    arguments = [*amount, f"-seed={number}", f"-timeout={HANG_S}", f"-rss_limit_mb={MEMORY_MBYTES}",
                 f"-max_len={target.max_nbytes}", f"-artifact_prefix={folder}/", str(kept), str(seeds)]  # fmt: skip
    return _run(target, arguments, patience_s)


def seeds_of(target: Target, number: int, count: int = NUM_SEEDS) -> set[bytes]:
    made: set[bytes] = set()

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )  # fmt: skip
    @given(target.inputs)
    def make(data: bytes) -> None:
        made.add(data)

    make()
    return {data for data in made if len(data) <= target.max_nbytes}


def _run(target: Target, arguments: Sequence[str], patience_s: float) -> Outcome:
    folder = BUILD / target.name
    folder.mkdir(parents=True, exist_ok=True)
    counts = folder / "counts"
    counts.unlink(missing_ok=True)
    environment = {**os.environ, **(sanitized.environment() if target.native else {})}
    begun_s = time.monotonic()
    command = [sys.executable, "-m", "tests.fuzz.worker", MODULES[target.name], target.name, str(counts), *arguments]
    with (folder / "log").open("w+", errors="replace") as log:
        try:
            code = subprocess.run(
                command, env=environment, stdout=log, stderr=log, timeout=patience_s + GRACE_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1  # whatever holds it up, libFuzzer's own clock did not end it
        log.seek(0)
        said = re.sub(r"INFO: Instrumenting .*\n", "", log.read())
    cases, taken = _counted(counts)
    edges = re.findall(r" cov: (\d+)", said)
    took = re.findall(r"^Done \d+ runs in (\d+) second", said, re.MULTILINE)
    elapsed_s = float(took[-1]) if took else time.monotonic() - begun_s
    return Outcome(cases, taken, max(1.0, elapsed_s), edges[-1] if edges else "-",
                   finding_of(target, code, cases, taken, said))  # fmt: skip


def _counted(path: Path) -> tuple[int, int]:
    data = path.read_bytes() if path.exists() else b""
    return (int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little"))


def finding_of(target: Target, code: int, cases: int, taken: int, said: str) -> str | None:
    if code != 0:
        files = re.findall(r"Test unit written to (\S+)", said)
        replay = f"\nreplay: python -m tests.fuzz --only {target.name} --replay {files[-1]}" if files else ""
        return f"ended with {code}:\n" + "\n".join(said.splitlines()[-SHOWN_LINES:]) + replay
    if not cases:
        return "ran no case"
    if not taken and cases > NUM_SEEDS:
        return "took no case: all were refused, so nothing behind the first check was read"
    return None


if __name__ == "__main__":
    sys.exit(main())
