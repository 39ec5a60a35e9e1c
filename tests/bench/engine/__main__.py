"""make bench-engine: steps on this processor against what its memory and its matmul allow, eager torch, transformers and
llama.cpp, as medians of ratios that were taken in turn in one run.

KVFERRY_BENCH_DTYPES=int8 and KVFERRY_BENCH_ROUNDS=3 make it shorter.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from services.engine.checkpoint import DEFAULT_MODEL
from services.engine.model_files import open_model
from tests.bench.engine.engines import CHUNK, Engine, LlamaCpp, Ours, Transformers
from tests.bench.engine.limits import Memory, matmul_seconds

ROOT = Path(__file__).resolve().parents[3]
ROUNDS = int(os.environ.get("KVFERRY_BENCH_ROUNDS", "9"))
DTYPES = os.environ.get("KVFERRY_BENCH_DTYPES", "float32,bfloat16,int8").split(",")
THREADS = len(os.sched_getaffinity(0))
BATCHES, CONTEXTS, PROMPTS = (1, 4, 8, 16), (128, 512, 2048), (512, 2048)
READ_NBYTES = 256 << 20
PAUSE_S = 0.02  # torch's threads spin for a while after they are done, on the next one's processor

console = Console()


@dataclass(frozen=True, slots=True)
class Row:
    """``ratio`` is above 1 where ours is better; a limit's is the share of it that is reached."""

    work: str
    ours: float
    peer: float
    ratio: float
    goal: float | None
    unit: str = "ms"


def in_turn(calls: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each, every round taking all of them one after the other."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(PAUSE_S)
            taken[name].append(call())
    return taken


def compared(work: str, ours: list[float], peer: list[float], goal: float | None = None) -> Row:
    """The median of the rounds' own ratios, which a machine that changes its speed does not move."""
    ratio = statistics.median(theirs / own for own, theirs in zip(ours, peer, strict=True))
    return Row(work, statistics.median(ours) * 1e3, statistics.median(peer) * 1e3, round(ratio, 3), goal)


class Bench:
    def __init__(self) -> None:
        self.files = open_model(DEFAULT_MODEL)
        self.memory = Memory(1 << 30)
        self.rows: list[Row] = []

    def read(self, threads: int = THREADS) -> float:
        """Seconds for a byte, in order."""
        piece = 1 << 20
        return self.memory.read(np.arange(READ_NBYTES // piece) * piece, piece, threads) / READ_NBYTES

    def read_scattered(self, ours: Ours) -> float:
        """Seconds for a byte of KV: keys and values of one layer lie together for one block."""
        layout = ours.layout
        piece = layout.block_nbytes // layout.num_layers
        blocks = np.random.default_rng(1).permutation((1 << 30) // layout.block_nbytes)
        offsets = (blocks[None, :] * layout.block_nbytes + np.arange(layout.num_layers)[:, None] * piece).reshape(-1)
        return self.memory.read(offsets, piece, THREADS) / (len(offsets) * piece)

    def run(self) -> list[Row]:
        peers: dict[str, Engine] = {"transformers bfloat16": Transformers(self.files, torch.bfloat16, THREADS)}
        if LlamaCpp.installed():
            peers["llama.cpp"] = LlamaCpp(self.files, THREADS)
        else:
            console.print("llama.cpp is not installed, so there is no comparison with it: pip install llama-cpp-python")
        for dtype in DTYPES:
            console.print(f"[dim]{dtype}")
            ours = Ours(self.files, dtype, THREADS)
            eager = None if dtype == "int8" else Ours(self.files, dtype, THREADS, torch_only=True)
            for batch in BATCHES:
                for context in CONTEXTS:
                    self.decode(dtype, ours, eager, peers, batch, context)
            self.growth(dtype, ours)
            self.threads(dtype, ours)
            for length in PROMPTS:
                self.prefill(dtype, ours, eager, peers, length)
        return self.rows

    def decode(self, dtype: str, ours: Ours, eager: Ours | None, peers: dict[str, Engine], batch: int,
               context: int) -> None:  # fmt: skip
        nbytes = ours.weights_nbytes + batch * context * ours.layout.block_nbytes // ours.layout.block_size
        work, first = f"decode {dtype} batch {batch} context {context}", (batch, context) == (1, 128)
        python: list[float] = []

        def step() -> float:
            seconds = ours.decode(batch, context)
            python.append(ours.inside.seconds / seconds)
            return seconds

        calls: dict[str, Callable[[], float]] = {"ours": step, "read": lambda: self.read() * nbytes}
        if eager is not None:
            calls["eager torch"] = lambda: eager.decode(batch, context)
        if first or (batch, context) == (8, 512):
            calls |= {n: lambda p=p: p.decode(batch, context) for n, p in peers.items() if p.decode(batch, context)}  # type: ignore[misc]
        taken = in_turn(calls)
        own = taken.pop("ours")
        self.rows.append(compared(f"{work} against its bytes", own, taken.pop("read"), 0.65 if first else None))
        for name, seconds in taken.items():
            goal = 5.0 if first and name.startswith("transformers") else None
            self.rows.append(compared(f"{work} against {name}", own, seconds, goal))
        if first:
            share = statistics.median(python)
            self.rows.append(Row(f"{work}: share inside the kernels", share, 1.0, round(share, 3), 0.85, "of a step"))

    def growth(self, dtype: str, ours: Ours) -> None:
        """What 2048 tokens of context cost over 128, against the reading of the KV between."""
        nbytes = 8 * (2048 - 128) * ours.layout.block_nbytes // ours.layout.block_size
        taken = in_turn(
            {
                "short": lambda: ours.decode(8, 128),
                "long": lambda: ours.decode(8, 2048),
                "in order": lambda: self.read() * nbytes,
                "as blocks lie": lambda: self.read_scattered(ours) * nbytes,
            }
        )
        grown = [long - short for short, long in zip(taken["short"], taken["long"], strict=True)]
        for name, goal in (("in order", 0.8), ("as blocks lie", None)):
            work = f"decode {dtype} batch 8, context 2048 over 128 against its KV bytes {name}"
            self.rows.append(compared(work, grown, taken[name], goal))

    def threads(self, dtype: str, ours: Ours) -> None:
        if THREADS > 1:
            alone = Ours(self.files, dtype, 1)
            for batch in (1, 8):
                taken = in_turn({"ours": lambda: ours.decode(batch, 128), "alone": lambda: alone.decode(batch, 128)})  # noqa: B023
                work = f"decode {dtype} batch {batch} context 128, {THREADS} threads against 1"
                self.rows.append(compared(work, taken["ours"], taken["alone"]))

    def prefill(self, dtype: str, ours: Ours, eager: Ours | None, peers: dict[str, Engine], length: int) -> None:
        config = self.files.config
        prompt = np.random.default_rng(2).integers(10, 20_000, length).tolist()
        hidden, inner, size = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
        weights = hidden * (2 * size + 2 * config.num_kv_heads * config.head_dim + 3 * inner)
        macs = config.num_layers * (
            length * weights + size * length * length
        )  # attention: half of length x length, twice
        kind = torch.float32 if dtype == "float32" else torch.bfloat16

        def at_matmul_rate() -> float:
            return matmul_seconds(2 * CHUNK, inner, inner, kind, THREADS) * macs / (2 * CHUNK * inner * inner)

        calls: dict[str, Callable[[], float]] = {"ours": lambda: ours.prefill(prompt), "matmul": at_matmul_rate}
        if eager is not None:
            calls["eager torch"] = lambda: eager.prefill(prompt)
        calls |= {name: lambda peer=peer: peer.prefill(prompt) for name, peer in peers.items()}  # type: ignore[misc]
        taken = in_turn(calls, min(ROUNDS, 5))
        own = taken.pop("ours")
        self.rows.append(
            compared(f"prefill {dtype} {length} tokens at the rate of matmul", own, taken.pop("matmul"), 0.65)
        )
        for name, seconds in taken.items():
            goal = 1.7 if name.startswith("transformers") else None
            self.rows.append(compared(f"prefill {dtype} {length} tokens against {name}", own, seconds, goal))


def main() -> None:
    rows = Bench().run()
    table = Table("work", "ours", "peer", "ratio", "goal")
    for row in rows:
        colour = "[red]" if row.goal is not None and row.ratio < row.goal else ""
        goal = "" if row.goal is None else f"{row.goal}"
        table.add_row(row.work, f"{row.ours:.2f}", f"{row.peer:.2f}", f"{colour}{row.ratio:.2f}", goal)
    console.print(table)
    out = ROOT / "build" / "bench" / "engine.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    console.print(f"wrote {out.relative_to(ROOT)}; {THREADS} threads, medians of {ROUNDS} rounds, all taken in turn")


if __name__ == "__main__":
    main()
