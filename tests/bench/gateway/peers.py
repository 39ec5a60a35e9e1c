"""Other gateways over the same null engine, HTTP to HTTP: sglang-router before an OpenAI API that computes nothing,
dynamo.frontend before a worker of dynamo's own runtime that computes nothing, and ours before its null workers.

sglang-router passes bytes on; dynamo's and ours make text of tokens.  Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from kvferry.cli import ports
from tests.bench.gateway.run import MODEL, ROOT, Run, hear, loaded, started, started_gateway
from tests.bench.terminal import say
from tests.bench.transport.rows import Row, less_is_better, more_is_better

# Of the modules that each needs, and how they are had.
SGLANG = (("sglang_router", "setproctitle", "orjson", "fastapi"),
          "pip install --no-deps sglang-router setproctitle orjson fastapi annotated-doc")  # fmt: skip
DYNAMO = (("dynamo._core", "dynamo.frontend", "uvloop", "msgspec", "transformers"),
          "pip install --no-deps ai-dynamo ai-dynamo-runtime uvloop msgspec")  # fmt: skip
READY_S = 60.0
MODEL_FOLDER = ROOT / "build" / "bench" / "dynamo-model"


@dataclass(frozen=True, slots=True)
class Load:
    num_streams: int
    offered: float
    options: argparse.Namespace


def compare(console: Console, options: argparse.Namespace) -> list[Row]:
    """In turn, ``options.rounds`` times; rows of ours against each peer that is here."""
    load = Load(options.peer_streams, options.peer_rate, options)
    measured: dict[str, Callable[[Load], Run]] = {"kvferry": _kvferry, "kvferry, gRPC": _kvferry_grpc}
    for name, (modules, remedy), measure in (
        ("sglang-router", SGLANG, _sglang), ("dynamo.frontend", DYNAMO, _dynamo)
    ):  # fmt: skip
        if missing := [module for module in modules if not _is_here(module)]:
            say(console, f"{name} is left out: {missing[0]} is not installed ({remedy})")
        else:
            measured[name] = measure
    runs: dict[str, list[Run]] = {name: [] for name in measured}
    for _ in range(options.rounds):
        for name, measure in list(measured.items()):
            try:
                runs[name].append(measure(load))
                say(console, f"{name}, {load.num_streams} streams, {load.offered:.0f} tokens/s offered: "
                    f"{runs[name][-1].told()}")  # fmt: skip
            except (RuntimeError, TimeoutError) as error:
                say(console, f"{name} is left out: {error}")
                del measured[name]
                runs[name] = []
    return [row for name in ("sglang-router", "dynamo.frontend") if runs.get(name) and runs["kvferry"]
            for row in _rows(name, runs["kvferry"], runs[name])]  # fmt: skip


def _rows(peer: str, ours: Sequence[Run], its: Sequence[Run]) -> list[Row]:
    what = f"HTTP, ours / {peer}"
    return [
        more_is_better(f"{what}, tokens per core", [r.tokens_per_core_s for r in ours],
                       [r.tokens_per_core_s for r in its], 1.0, "tokens/s"),
        *(
            less_is_better(f"{what}, latency {q}", [getattr(r, f"{q}_ms") for r in ours],
                           [getattr(r, f"{q}_ms") for r in its], 1.0, "ms")
            for q in ("p50", "p99")
        ),
    ]  # fmt: skip


def _kvferry(load: Load) -> Run:
    with started_gateway(load.options.workers, load.num_streams, "words") as gateway:
        return loaded(gateway.process, gateway.workers, gateway.http, load.num_streams, load.offered, load.options,
                      http=True)  # fmt: skip


def _kvferry_grpc(load: Load) -> Run:
    with started_gateway(load.options.workers, load.num_streams) as gateway:
        return loaded(gateway.process, gateway.workers, gateway.grpc, load.num_streams, load.offered, load.options)


def _sglang(load: Load) -> Run:
    worker, address, metrics = _addresses(3)
    with started("http-worker", "tests.bench.gateway.http_worker", worker, MODEL, str(load.options.workers)) as engine:
        hear(engine, "ready")
        host, _, port = address.rpartition(":")
        flags = ("--worker-urls", f"http://{worker}", "--host", host, "--port", port, "--policy", "round_robin",
                 "--prometheus-host", host, "--prometheus-port", metrics.rpartition(":")[2], "--log-level", "warn",
                 "--max-concurrent-requests", str(load.num_streams + 1))  # fmt: skip
        with started("sglang-router", "sglang_router.launch_router", *flags) as router:
            _wait_until_it_serves(router, address)
            return loaded(router, engine, address, load.num_streams, load.offered, load.options, http=True)


def _dynamo(load: Load) -> Run:
    (address,) = _addresses(1)
    with _meeting_place() as environment, started(
        "dynamo-worker", "tests.bench.gateway.dynamo_worker", str(MODEL_FOLDER), MODEL,
        str(load.options.workers), environment=environment,
    ) as engine:  # fmt: skip
        hear(engine, "ready")
        host, _, port = address.rpartition(":")
        flags = ("--http-host", host, "--http-port", port, "--discovery-backend", "file", "--request-plane", "tcp",
                 "--event-plane", "zmq", "--router-mode", "round-robin")  # fmt: skip
        with started("dynamo-frontend", "dynamo.frontend", *flags, environment=environment) as frontend:
            _wait_until_it_serves(frontend, address)
            return loaded(frontend, engine, address, load.num_streams, load.offered, load.options, http=True)


@contextmanager
def _meeting_place() -> Iterator[dict[str, str]]:
    MODEL_FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        loopback = dict.fromkeys(
            ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST"), ports.LOOPBACK
        )
        yield {"DYN_FILE_KV": name, "DYN_EVENT_PLANE": "zmq", "DYN_LOG": "warn", "HOME": name, **loopback}


def _wait_until_it_serves(router: subprocess.Popen[str], address: str) -> None:
    """Raises RuntimeError when it ends, or does not name the model in time."""
    until_s = time.monotonic() + READY_S
    while time.monotonic() < until_s and router.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{address}/v1/models", timeout=2) as answer:
                if MODEL.encode() in answer.read():
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{router.args!r} did not serve the model within {READY_S:.0f} s")


def _addresses(count: int) -> list[str]:
    return [ports.join(ports.LOOPBACK, port) for port in ports.pick_free(count)]


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
