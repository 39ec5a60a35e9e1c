"""make soak: a cluster under steady load for half an hour, whose processes must hold no more at its end.

Two prefill workers, two decode workers, two gateways and a directory, as processes of their own with the real model, pools
too small for all that is asked.  Half of the prompts were never asked before, some clients leave.  Memory (each one's own,
and what they share), descriptors and threads of every process are sampled 120 times; the second quarter's medians are held
against the last quarter's, each known answer against the one that came while nothing else was asked.  Exit status 1:
something grew, an answer was wrong, lost or refused, or something was left over.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from kvferry.cli.members import ClusterError, clone_root
from tests.chaos.oracle import Verdict
from tests.soak.run import Report, Settings, run
from tests.soak.trend import Held


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of what is asked and when")
    parser.add_argument("--seconds", type=float, default=1800.0, help="how long")
    parser.add_argument("--streams", type=int, default=3, help="clients that ask at once")
    parser.add_argument("--logs", type=Path, default=None, help="the members' logs; default build/logs/soak")
    options = parser.parse_args()
    began_s = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began_s:6.0f} s  {line}", flush=True)

    build = clone_root() / "build"
    settings = Settings(
        options.seed, options.seconds, options.logs or build / "logs" / "soak", num_streams=options.streams
    )
    try:
        report = run(settings, say)
    except ClusterError as error:
        print(f"make soak: {error}", *error.log_tail, sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    _print(report, settings.seconds)
    _write(report, settings, build / "soak.json")
    return not report.is_good


def _print(report: Report, seconds: float) -> None:
    print(f"\n{len(report.judged)} requests in {seconds:.0f} s, {report.num_tokens} tokens")
    for verdict in Verdict:
        if found := report.of(verdict):
            print(f"{len(found):6} {verdict.value}")
    print(f"\n{'':12}" + "".join(f"{held.label:>24}" for held in Held))
    for member in dict.fromkeys(t.member for t in report.trends):
        cells = (f"{t.early:.1f} to {t.late:.1f} {t.held.unit}".rstrip() for t in report.trends if t.member == member)
        print(f"{member:12}" + "".join(f"{cell:>24}" for cell in cells))
    for judged in (*report.of(Verdict.WRONG), *report.of(Verdict.LOST), *report.of(Verdict.REFUSED)):
        print(f"  {judged.verdict.value}: {judged.why}")
    for line in report.broken:
        print(f"  broken: {line}")


def _write(report: Report, settings: Settings, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    series = [
        {"member": member, "held": held.label, "unit": held.unit, "samples": samples}
        for (member, held), samples in report.samples.series.items()
    ]
    path.write_text(
        json.dumps({"seconds": settings.seconds, "requests": len(report.judged), "series": series}, indent=1)
    )


if __name__ == "__main__":
    sys.exit(main())
