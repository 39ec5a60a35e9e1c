"""One run of ``make bench-gateway``: its processes, the load on them, and what was seen."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvferry.cli import ports
from tests.bench.gateway.null_workers import FIRST_STEP_S

ROOT = Path(__file__).resolve().parents[3]
LOGS = ROOT / "build" / "logs" / "bench-gateway"
MODEL = "smollm2-135m-instruct"
# Longer than a first step, which ends before workers look at their pace again.
WARM_S = FIRST_STEP_S + 1.0


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


@dataclass(frozen=True, slots=True)
class Gateway:
    process: subprocess.Popen[str]
    workers: subprocess.Popen[str]
    grpc: str
    http: str


@contextmanager
def started_gateway(num_workers: int, num_streams: int, *how: str) -> Iterator[Gateway]:
    """One gateway and its workers, which are told ``how`` to stamp, started anew."""
    directory, grpc_address, http_address = (ports.join(ports.LOOPBACK, port) for port in ports.pick_free(3, avoid=()))
    with (
        started("directory", "services.directory", "--listen", directory),
        started("null-workers", "tests.bench.gateway.null_workers", directory, MODEL, str(num_workers), *how) as null,
    ):
        hear(null, "ready")
        flags = ("--listen", grpc_address, "--http-listen", http_address, "--directory", directory)
        with started("gateway", "gateway", *flags, "--max-requests", str(num_streams + 1)) as gateway:
            wait_until_listening(gateway)
            yield Gateway(gateway, null, grpc_address, http_address)


def measure(num_streams: int, offered: float, options: argparse.Namespace) -> Run:
    """Raises RuntimeError when a process ends early."""
    with started_gateway(options.workers, num_streams) as gateway:
        return loaded(gateway.process, gateway.workers, gateway.grpc, num_streams, offered, options)


def measure_bare(num_streams: int, offered: float, options: argparse.Namespace) -> Run:
    """The same tokens from a server that is grpc.aio and nothing else.  Raises RuntimeError when it ends early."""
    address = ports.join(ports.LOOPBACK, ports.pick_free(1, avoid=())[0])
    with started("bare", "tests.bench.gateway.bare", address, str(options.workers)) as bare:
        hear(bare, "ready")
        return loaded(bare, bare, address, num_streams, offered, options)


def loaded(
    server: subprocess.Popen[str], paced: subprocess.Popen[str], address: str, num_streams: int, offered: float,
    options: argparse.Namespace, *, http: bool = False,
) -> Run:  # fmt: skip
    """Puts the load on ``server``; ``paced`` is told the pace when all streams are open.  ``http``: as chats with words."""
    arguments = (address, str(num_streams), str(WARM_S), str(options.seconds), *((MODEL,) if http else ()))
    with started("load", f"tests.bench.gateway.{'http_load' if http else 'load'}", *arguments) as load:
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
def started(
    name: str, module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, **(environment or {})},
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
    deadline_s = time.monotonic() + 60
    while '"worker joined"' not in (LOGS / "gateway.log").read_text():
        if gateway.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"the gateway found no worker; see {LOGS}")
        time.sleep(0.1)
    time.sleep(1.0)  # the other workers


def cpu_s(pid: int) -> float:
    """User and system time of all threads so far (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
