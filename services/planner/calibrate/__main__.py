"""python -m services.planner.calibrate: one JSON document on stdout, and on stderr a line of JSON for each step.  With
--sums FILE nothing is measured: the document is that of the steps whose sums are there."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.engine.checkpoint import DEFAULT_MODEL
from services.engine.model_config import ModelError
from services.engine.runners import AUTO
from services.planner.calibrate.fit import fit_sums, spread_of
from services.planner.calibrate.steps import ROUND_TRIP_S, TRANSFER_BYTES_PER_S, calibrate
from services.planner.simulator.cost_model import CostModel
from services.runtime import logs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.planner.calibrate", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default=AUTO)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sums", type=Path, help="what kvferry calibrate --live heard")
    asked = parser.parse_args()
    logs.configure("calibrate", level="warning")
    if asked.sums is not None:
        print(json.dumps(in_service(json.loads(asked.sums.read_text()))))
        return 0
    try:
        found = calibrate(asked.model, asked.dtype, asked.threads, asked.rounds, _tell)
    except ModelError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    print(json.dumps(found.content()))
    return 0


def in_service(heard: dict[str, Any]) -> dict[str, Any]:
    """What ``Calibration.content`` says, of steps that workers computed for clients."""
    sums = heard["sums"]
    found = fit_sums(sums["seconds"], sums["shares"], sums["ratios"], sums["products"], sums["squares"])
    costs = CostModel(
        *found.prices, heard["round_trip_s"] or ROUND_TRIP_S, heard["transfer_bytes_per_s"] or TRANSFER_BYTES_PER_S,
        spread_of(sums["scatter"], found),
    )  # fmt: skip
    told = {key: heard[key] for key in ("block_nbytes", "block_size", "model", "dtype")}
    return {
        "costs": asdict(costs), **told, "steps": round(sums["shares"][0]), "rms_error": found.rms_error,
        "transfer_measured": bool(heard["transfer_bytes_per_s"]),
    }  # fmt: skip


def _tell(done: int, total: int, what: str) -> None:
    print(json.dumps({"done": done, "total": total, "what": what}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
