"""make bench-gateway: tokens through one gateway process, from decode workers that compute nothing to clients over gRPC.

Workers, gateway and clients are processes of their own on this machine.  A core is a second of the gateway's own CPU time.
Latency counts from the drawing of a token to its reading by the client: both gRPC hops and the worker's loop are in it.
Each load is also put on a bare grpc.aio server, which sends every token as a message that was serialised before: a gateway
of one message a token can do no better.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from kvferry.cli import ports
from tests.bench.terminal import say
from tests.bench.transport.report import table, write_json
from tests.bench.transport.rows import Row, more_is_better, within

ROOT = Path(__file__).resolve().parents[3]
OUT = ROOT / "build" / "bench" / "gateway.json"
LOGS = ROOT / "build" / "logs" / "bench-gateway"
MODEL = "smollm2-135m-instruct"
RATE_GOAL, LATENCY_GOAL_MS, STREAMS_GOAL = 25_000.0, 2.0, 5_000
WARM_S = 3.0


@dataclass(frozen=True, slots=True)
class Run:
    tokens_per_s: float
    tokens_per_message: float
    cores: float
    workers_cores: float
    clients_cores: float
    p50_ms: float
    p99_ms: float

    @property
    def tokens_per_core_s(self) -> float:
        return self.tokens_per_s / self.cores

    def told(self) -> str:
        return (
            f"{self.tokens_per_s:.0f} tokens/s in messages of {self.tokens_per_message:.2f}, p50 {self.p50_ms:.1f} and "
            f"p99 {self.p99_ms:.1f} ms, cores: {self.cores:.2f}, workers {self.workers_cores:.2f}, "
            f"clients {self.clients_cores:.2f}"
        )


def main() -> None:
    options = parse()
    console = Console()
    works = {
        "full load": (options.streams, RATE_GOAL),
        "half load": (options.streams, RATE_GOAL / 2),
        "many streams": (STREAMS_GOAL, RATE_GOAL / 2),
    }
    rows: list[Row] = []
    for name in (name for name in works if any(part in name for part in options.only)):
        num_streams, offered = works[name]
        runs, bare = [], []
        for _ in range(options.rounds):
            runs.append(measure(num_streams, offered, options))
            bare.append(measure_bare(num_streams, offered, options))
        what = f"{name}: {num_streams} streams, {offered:.0f} tokens/s offered"
        found = [run.tokens_per_core_s for run in runs]
        rows.append(more_is_better(f"{what}, per core / goal", found, [RATE_GOAL] * len(runs), 1.0, "tokens/s"))
        peer = [run.tokens_per_core_s for run in bare]
        rows.append(more_is_better(f"{what}, per core / bare grpc.aio", found, peer, 1.0, "tokens/s"))
        rows.append(
            more_is_better(f"{what}, delivered / offered", [run.tokens_per_s for run in runs],
                           [offered] * len(runs), 0.99, "tokens/s")
        )  # fmt: skip
        for quantile in ("p50", "p99"):
            found = [getattr(run, f"{quantile}_ms") for run in runs]
            rows.append(within(f"{what}, latency {quantile} / allowed", found, LATENCY_GOAL_MS, "ms"))
        for who, its in (("gateway", runs), ("bare grpc.aio", bare)):
            say(console, f"{what}, {who}: " + "; ".join(run.told() for run in its))
    console.print(table(rows))
    write_json(rows, OUT)
    say(console, f"medians of {options.rounds} rounds; {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    say(console, f"latencies wrap at 2 s: believe none near it; wrote {OUT.relative_to(ROOT)}")


def measure(num_streams: int, offered: float, options: argparse.Namespace) -> Run:
    """One gateway and its workers, started anew.  Raises RuntimeError when one of them ends early."""
    directory, grpc_address, http_address = (ports.join(ports.LOOPBACK, port) for port in ports.pick_free(3, avoid=()))
    with (
        started("directory", "services.directory", "--listen", directory),
        started("null-workers", "tests.bench.gateway.null_workers", directory, MODEL, str(options.workers)) as null,
    ):
        hear(null, "ready")
        flags = ("--listen", grpc_address, "--http-listen", http_address, "--directory", directory)
        with started("gateway", "gateway", *flags, "--max-requests", str(num_streams + 1)) as gateway:
            wait_until_listening(gateway)
            return loaded(gateway, null, grpc_address, num_streams, offered, options)


def measure_bare(num_streams: int, offered: float, options: argparse.Namespace) -> Run:
    """The same tokens from a server that is grpc.aio and nothing else.  Raises RuntimeError when it ends early."""
    address = ports.join(ports.LOOPBACK, ports.pick_free(1, avoid=())[0])
    with started("bare", "tests.bench.gateway.bare", address, str(options.workers)) as bare:
        hear(bare, "ready")
        return loaded(bare, bare, address, num_streams, offered, options)


def loaded(
    server: subprocess.Popen[str], paced: subprocess.Popen[str], address: str, num_streams: int, offered: float,
    options: argparse.Namespace,
) -> Run:  # fmt: skip
    """Puts the load on ``server``; ``paced`` is told the pace when all streams are open."""
    with started(
        "load", "tests.bench.gateway.load", address, str(num_streams), str(WARM_S), str(options.seconds)
    ) as load:
        hear(load, "open")
        assert paced.stdin is not None
        assert load.stdout is not None
        paced.stdin.write(f"{num_streams / offered}\n")
        paced.stdin.flush()
        hear(load, "begin")
        began_s, before = time.monotonic(), [cpu_s(process.pid) for process in (server, paced, load)]
        hear(load, "end")
        seconds = time.monotonic() - began_s
        cores = [(cpu_s(p.pid) - b) / seconds for p, b in zip((server, paced, load), before, strict=True)]
        found = json.loads(load.stdout.readline())
    per_message = found["tokens_per_s"] / found["messages_per_s"]
    return Run(found["tokens_per_s"], per_message, *cores, found["p50_ms"], found["p99_ms"])


@contextmanager
def started(name: str, module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def hear(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    if (line := process.stdout.readline()).strip() != word:
        raise RuntimeError(f"{process.args} said {line!r} instead of {word!r}; see {LOGS}")


def wait_until_listening(gateway: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 30
    while '"worker joined"' not in (LOGS / "gateway.log").read_text():
        if gateway.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"the gateway found no worker; see {LOGS}")
        time.sleep(0.1)
    time.sleep(1.0)  # the other workers


def cpu_s(pid: int) -> float:
    """User and system time of all threads so far (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="that count of each (default: 3)")
    parser.add_argument("--streams", type=int, default=512, help="of full and half load (default: 512)")
    parser.add_argument("--workers", type=int, default=16, help="that the streams are spread over (default: 16)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured in a round (default: 5)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="by part of a name: full, half, many")
    options = parser.parse_args()
    for name in ("rounds", "streams", "workers", "seconds"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} takes more than 0")
    return options


if __name__ == "__main__":
    main()
