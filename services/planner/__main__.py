"""python -m services.planner: the plan as one JSON document on stdout, and what goes on as lines of JSON on stderr.

`kvferry plan` runs this and shows it.  Ends with 1 and a line that says what is wrong."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from gateway.admission import PATIENCE
from kvferry.bench import slo
from kvferry.bench.workload import read_trace
from kvferry.errors import Error, InvalidRequestError
from services.planner.hardware import DEFAULT_CATALOGUE, read_catalogue
from services.planner.models import KV_NBYTES, find_model
from services.planner.page import render
from services.planner.plan import Request, make_plan
from services.planner.report import MOST_SEEDS
from services.planner.traffic import traffic_of

# Between two lines of progress.
TELL_EVERY_S = 0.1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="services.planner", description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--hardware", type=Path, default=DEFAULT_CATALOGUE)
    parser.add_argument("--devices")
    parser.add_argument("--slo", required=True)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument(
        "--patience", type=float, help="of the gateway's line; its default and the order of arrival are tried otherwise"
    )
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--seeds", type=int, choices=range(1, MOST_SEEDS + 1), required=True)
    parser.add_argument("--no-sensitivity", dest="sensitivity", action="store_false")
    parser.add_argument("--html", type=Path)
    return parser.parse_args(arguments)


def request_of(args: argparse.Namespace) -> Request:
    """Reads what the arguments name.  Raises InvalidRequestError."""
    model = find_model(args.model)
    catalogue = read_catalogue(args.hardware)
    devices = [name.strip() for name in args.devices.split(",")] if args.devices else catalogue.one_by_one
    if unknown := [name for name in devices if name not in catalogue.devices]:
        raise InvalidRequestError(
            f"{args.hardware} has no device {unknown[0]!r}; there are {', '.join(catalogue.devices)}"
        )
    cache_tokens = catalogue.assumptions.prefix_cache_gbytes * 1e9 / model.kv_token_nbytes(next(iter(KV_NBYTES)))
    traffic = traffic_of(read_trace(args.trace), cache_tokens)
    return Request(
        trace=args.trace.name, traffic=traffic.faster(args.speed), rate=args.rate, model=model,
        dtype=args.dtype or model.weight_dtype, catalogue=catalogue, devices=devices, slo=slo.parse(args.slo),
        num_seeds=args.seeds, most_requests=args.requests, sensitivity=args.sensitivity,
        patiences=(PATIENCE, 0.0) if args.patience is None else (args.patience,),
    )  # fmt: skip


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    told_s = 0.0

    def tell(done: float, what: str) -> None:
        nonlocal told_s
        if (now := time.monotonic()) - told_s >= TELL_EVERY_S:
            told_s = now
            print(json.dumps({"done": done, "what": what}), file=sys.stderr, flush=True)

    try:
        report = make_plan(request_of(args), tell)
        if args.html is not None:
            _write(args.html, render(report))
    except Error as error:
        print(json.dumps({"error": error.message}), file=sys.stderr, flush=True)
        return 1
    json.dump(asdict(report), sys.stdout)
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
