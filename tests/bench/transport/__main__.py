"""make bench-transport: blocks between two processes, against NIXL and against memcpy, as ratios taken in one run."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[3]
ROUNDS = 15
# (name, blocks, bytes of a block, operation, goal against memcpy, goal against NIXL)
WORKS = (
    ("write 1024 x 64 KiB", 1024, 65536, "write", 0.90, 2.5),
    ("read 1024 x 64 KiB", 1024, 65536, "read", 0.85, 2.0),
    ("write 960 x 12 KiB", 960, 12288, "write", 0.75, 4.0),
    ("read 960 x 12 KiB", 960, 12288, "read", 0.75, 4.0),
)

SCATTERED = """
#include <string.h>
#include <stdint.h>
void scattered(char *to, const char *from, const int64_t *t, const int64_t *f, int64_t n, int64_t size)
{ for (int64_t i = 0; i < n; i++) memcpy(to + t[i] * size, from + f[i] * size, size); }
"""


class Process:
    def __init__(self, library: str, num_blocks: int, nbytes: int) -> None:
        command = [sys.executable, "-m", "tests.bench.transport.side", library, str(num_blocks), str(nbytes)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            try:
                return json.loads(line)
            except ValueError:
                continue  # the library's own words
        raise RuntimeError(f"a side ended while asked to {do}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Pair:
    def __init__(self, library: str, num_blocks: int, nbytes: int) -> None:
        self.target = Process(library, num_blocks, nbytes)
        self.initiator = Process(library, num_blocks, nbytes)
        back = self.initiator.ask("connect", description=self.target.ask("describe"))
        if back:
            self.target.ask("connect", description=back)

    def run(self, op: str, local: list[int], remote: list[int], salt: int) -> float:
        """Fills both pools, runs, and looks at every block that was moved."""
        self.target.ask("fill", salt=salt)
        self.initiator.ask("fill", salt=salt + 101)
        seconds: float = self.initiator.ask("run", op=op, local=local, remote=remote)
        here, there = self.initiator.ask("sums", blocks=local), self.target.ask("sums", blocks=remote)
        if here != there:
            raise RuntimeError(f"{op}: the data differs")
        return seconds

    def close(self) -> None:
        self.initiator.close()
        self.target.close()


class Memcpy:
    """The limit: the same scattered copies within one process."""

    def __init__(self, num_blocks: int, nbytes: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "s.c", Path(folder) / "s.so"
            source.write_text(SCATTERED)
            subprocess.run(["gcc", "-O3", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
            self._copy = ctypes.CDLL(str(library)).scattered
        self._from = np.ones((num_blocks, nbytes), dtype=np.uint8)
        self._to = np.zeros((num_blocks, nbytes), dtype=np.uint8)

    def run(self, local: list[int], remote: list[int]) -> float:
        to, here = np.asarray(remote, np.int64), np.asarray(local, np.int64)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (self._to, self._from, to, here)]
        began = time.perf_counter()
        self._copy(*pointers, ctypes.c_int64(len(to)), ctypes.c_int64(self._to.shape[1]))
        return time.perf_counter() - began


def measure(num_blocks: int, nbytes: int, op: str, peers: list[str]) -> dict[str, list[float]]:
    """Seconds per round of each, in turn within every round; twice as many blocks as are moved lie in each pool."""
    rng = np.random.default_rng(7)
    memcpy = Memcpy(2 * num_blocks, nbytes)
    pairs = {name: Pair(name, 2 * num_blocks, nbytes) for name in peers}
    seconds: dict[str, list[float]] = {name: [] for name in ("memcpy", *peers)}
    try:
        for round_ in track(range(-2, ROUNDS), f"{op} {num_blocks} x {nbytes >> 10} KiB", transient=True):
            local, remote = (rng.permutation(2 * num_blocks)[:num_blocks].tolist() for _ in range(2))
            taken = {"memcpy": memcpy.run(local, remote)}
            for name, pair in pairs.items():
                taken[name] = pair.run(op, local, remote, salt=round_ + 2)
            if round_ >= 0:  # two rounds touch the pages
                for name, value in taken.items():
                    seconds[name].append(value)
    finally:
        for pair in pairs.values():
            pair.close()
    return seconds


def main() -> None:
    console = Console()
    peers = ["kvferry"]
    if importlib.util.find_spec("nixl_cu13"):
        peers.append("nixl")
    else:
        console.print("NIXL is not installed, so there is no comparison with it: pip install --no-deps nixl-cu13")
    table = Table("work", "GB/s ours", "GB/s memcpy", "ours / memcpy", "goal", "GB/s NIXL", "ours / NIXL", "goal")
    rows = []
    for name, num_blocks, nbytes, op, goal_memcpy, goal_nixl in WORKS:
        seconds = measure(num_blocks, nbytes, op, peers)
        rates = {peer: num_blocks * nbytes / statistics.median(values) / 1e9 for peer, values in seconds.items()}

        def ratio(peer: str, seconds: dict[str, list[float]] = seconds) -> float:
            """The median of the rounds' own ratios, which a machine that changes its speed does not move."""
            return statistics.median(b / a for a, b in zip(seconds["kvferry"], seconds[peer], strict=True))

        cells = [name, f"{rates['kvferry']:.2f}", f"{rates['memcpy']:.2f}", f"{ratio('memcpy'):.2f}", f"{goal_memcpy}"]
        goals = {"memcpy": goal_memcpy, "nixl": goal_nixl}
        for peer in seconds:
            if peer != "kvferry":
                rows.append(
                    {
                        "work": f"{name} against {peer}",
                        "ours": rates["kvferry"],
                        "peer": rates[peer],
                        "ratio": ratio(peer),
                        "goal": goals[peer],
                        "unit": "GB/s",
                    }
                )
        cells += [f"{rates['nixl']:.2f}", f"{ratio('nixl'):.2f}", f"{goal_nixl}"] if "nixl" in rates else ["-"] * 3
        table.add_row(*cells)
    console.print(table)
    out = ROOT / "build" / "bench" / "transport.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(f"wrote {out.relative_to(ROOT)}; medians of {ROUNDS} rounds, all taken in turn in one run")


if __name__ == "__main__":
    main()
