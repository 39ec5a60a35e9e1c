"""make bench-engine: steps on this processor against what its memory and its matmul allow, eager torch, transformers and
llama.cpp (where llama-cpp-python is installed), as medians of ratios that were taken in turn in one run; and what narrow
formats cost in quality."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from services.engine.checkpoint import DEFAULT_MODEL
from services.engine.kernels.packed import DTYPES
from services.engine.model_files import ModelFiles, open_model
from tests.bench.engine import quality
from tests.bench.engine.engines import Engine, LlamaCpp, Transformers
from tests.bench.engine.limits import Memory
from tests.bench.engine.rows import Row
from tests.bench.engine.works import Setting, Works, thread_counts

ROOT = Path(__file__).resolve().parents[3]
WORKS = ("decode", "growth", "prefill", "prefix", "host", "accounts", "quality")

console = Console()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.engine", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="that count, of each work (default: 9)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="formats (default: all)")
    parser.add_argument("--threads", nargs="+", type=int, default=thread_counts(), help="default: all cores, and one")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="works (default: all)")
    parser.add_argument("--no-peers", action="store_true", help="against the machine's limits and eager torch alone")
    return parser.parse_args()


def peers(files: ModelFiles, threads: int) -> dict[str, Engine]:
    found: dict[str, Engine] = {"transformers bfloat16": Transformers(files, torch.bfloat16, threads)}
    if LlamaCpp.installed():
        found["llama.cpp"] = LlamaCpp(files, threads)
    else:
        console.print("llama.cpp is not installed, so there is no comparison with it: pip install llama-cpp-python")
    return found


def measure(args: argparse.Namespace) -> list[Row]:
    files = open_model(DEFAULT_MODEL)
    rows: list[Row] = []
    timed = [name for name in WORKS if name in args.only and name != "quality"]
    for threads in args.threads if timed else ():
        setting = Setting(files, Memory(1 << 30), {} if args.no_peers else peers(files, threads), threads, args.rounds)
        for dtype in args.dtypes:
            works = Works(setting, dtype)
            for name in timed:
                console.print(f"[dim]{dtype}, {threads} threads: {name}")
                rows += getattr(works, name)()
    if "quality" in args.only:
        console.print("[dim]quality")
        rows += quality.measure(files, args.dtypes)
    return rows


def main() -> None:
    args = parse()
    rows = measure(args)
    table = Table("work", "ours", "peer", "ratio", "goal", box=None)
    for row in rows:
        colour = "" if row.is_met else "[red]"
        goal = "" if row.goal is None else f"{row.goal:g}"
        table.add_row(row.work, f"{row.ours:.2f}", f"{row.peer:.2f}", f"{colour}{row.ratio:.3f}", goal)
    console.print(table)
    out = ROOT / "build" / "bench" / "engine.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    console.print(f"wrote {out.relative_to(ROOT)}; medians of {args.rounds} rounds, all taken in turn")


if __name__ == "__main__":
    main()
