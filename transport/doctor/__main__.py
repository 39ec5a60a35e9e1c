"""python -m transport.doctor [--json] [--no-measure].  Ends with 1 when something is broken."""

from __future__ import annotations

import argparse
import sys

from transport.doctor.report import examine
from transport.doctor.trial import Work


def main() -> int:
    parser = argparse.ArgumentParser("transport.doctor", description="What this host gives the transport.")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.add_argument("--no-measure", action="store_true", help="skip measuring speed")
    asked = parser.parse_args()

    def tell(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    report = examine(tell, Work() if asked.no_measure else None)
    print(report.as_json() if asked.json else report.as_text())
    return int(report.broken)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
