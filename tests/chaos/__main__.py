"""make chaos: a cluster under load and under faults, and an oracle that knows what every answer must be.

Two prefill workers, two decode workers, two gateways and a directory, as processes of their own with the real model.
Clients ask short and long prompts, greedy and seeded, through both gateways; some disconnect.  Processes are killed,
stopped and continued within their lease and after it, terminated, drained, and restarted in turn, by a schedule that the
seed gives.  Where network namespaces can be made, which takes root, each is on a host of its own, and packets between two
of them are lost for a while.  Exit status 1: an answer was wrong or lost, or something was left over.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from kvferry.cli.members import ClusterError, clone_root
from tests.chaos.oracle import Verdict
from tests.chaos.run import Report, Settings, run

SHOWN = 12


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16), help="replays a run's schedule")
    parser.add_argument("--seconds", type=float, default=600.0, help="for how long faults are injected")
    parser.add_argument("--logs", type=Path, default=None, help="the members' logs; default build/logs/chaos")
    options = parser.parse_args()
    began_s = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began_s:6.1f} s  {line}", flush=True)

    say(f"seed {options.seed}")
    log_dir = options.logs or clone_root() / "build" / "logs" / "chaos"
    try:
        report = run(Settings(options.seed, options.seconds, log_dir), say)
    except ClusterError as error:
        print(f"make chaos: {error}", *error.log_tail, sep="\n", file=sys.stderr)
        return 1
    _print(report)
    if not report.is_good:
        print(
            f"\nthe same schedule again: make chaos SEED={options.seed} SECONDS_LIMIT={options.seconds:g}; logs: {log_dir}"
        )
    return not report.is_good


def _print(report: Report) -> None:
    print()
    for kind, count in report.faults.items():
        print(f"{count:6} {kind.value}")
    print(f"{sum(report.faults.values()):6} faults injected\n{len(report.judged):6} requests")
    for verdict in Verdict:
        print(f"{len(report.of(verdict)):6} {verdict.value}")
        if verdict is Verdict.COMPLETED:
            print(f"{report.num_recovered:6}   of them recovered by their gateway")
    for verdict in (Verdict.WRONG, Verdict.LOST, Verdict.CUT_OFF, Verdict.REFUSED):
        for judged in report.of(verdict)[:SHOWN]:
            outcome = judged.outcome
            when = f"{outcome.began_s - report.began_s:.1f} to {outcome.ended_s - report.began_s:.1f} s"
            print(f"  {verdict.value}, {when}, {len(outcome.token_ids)} tokens: {judged.why}")
    for line in report.broken:
        print(f"  broken: {line}")


if __name__ == "__main__":
    sys.exit(main())
