"""Case after case for as long as asked, each target in turn: python -m tests.fuzz --seconds 600 [--only gguf]"""

from __future__ import annotations

import argparse
import faulthandler
import resource
import sys
import time
import traceback
import warnings
from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, Target

# Of one case; whoever takes longer hangs, and what it was at is printed.
HANG_S = 60
MEMORY_NBYTES = 6 << 30
CASES_A_TURN = 100


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--only", help="one target's name")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    targets = [target for target in TARGETS if options.only in (None, target.name)]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_NBYTES, MEMORY_NBYTES))  # what grows beyond is a finding
    warnings.simplefilter("error")
    counts: Counter[str] = Counter()
    found: dict[str, str] = {}
    until_s = time.monotonic() + options.seconds
    turn = options.seed
    while time.monotonic() < until_s and len(found) < len(targets):
        turn += 1
        for target in targets:
            if target.name not in found and time.monotonic() < until_s:
                try:
                    _fuzz(target, turn, counts)
                except Exception:
                    found[target.name] = traceback.format_exc()
    for target in targets:
        verdict = "FOUND" if target.name in found else "ok"
        print(f"{target.name:20} {counts[target.name]:>10} cases  {verdict}")
    print(f"{'in all':20} {counts.total():>10} cases")
    for name, trace in found.items():
        print(f"\n{name}:\n{trace}")
    return bool(found)


def _fuzz(target: Target, turn: int, counts: Counter[str]) -> None:
    @seed(turn)
    @settings(
        max_examples=CASES_A_TURN, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink], print_blob=False,
    )  # fmt: skip
    @given(st.shared(target.inputs, key=target.name))
    def read(case: object) -> None:
        counts[target.name] += 1
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            target.read(case)
        finally:
            faulthandler.cancel_dump_traceback_later()

    read()


if __name__ == "__main__":
    sys.exit(main())
