"""python -m services.planner.calibrate: one JSON document on stdout, and on stderr a line of JSON for each step."""

from __future__ import annotations

import argparse
import json
import sys

from services.engine.checkpoint import DEFAULT_MODEL
from services.engine.model_config import ModelError
from services.engine.runners import AUTO
from services.planner.calibrate.steps import calibrate
from services.runtime import logs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.planner.calibrate", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default=AUTO)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    logs.configure("calibrate", level="warning")
    try:
        found = calibrate(asked.model, asked.dtype, asked.threads, asked.rounds, _tell)
    except ModelError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    print(json.dumps(found.content()))
    return 0


def _tell(done: int, total: int, what: str) -> None:
    print(json.dumps({"done": done, "total": total, "what": what}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
