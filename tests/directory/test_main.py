from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvferry.api.directory.v1 import directory_pb2, directory_pb2_grpc
from tests.directory.redis_server import RedisServer

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "services.directory", *arguments],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def lines_until(process: subprocess.Popen[str], event: str) -> dict[str, Any]:
    assert process.stderr is not None
    for line in process.stderr:
        entry: dict[str, Any] = json.loads(line)
        if entry["event"] == event:
            return entry
    raise AssertionError(f"{event!r} was never logged")


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    port, metrics_port = free_port(), free_port()
    process = start("--listen", f"127.0.0.1:{port}", "--metrics-port", str(metrics_port))
    try:
        yield process, port, metrics_port
    finally:
        process.kill()
        process.communicate(timeout=5)


def test_serves_until_sigterm(process: tuple[subprocess.Popen[str], int, int]) -> None:
    child, port, metrics_port = process
    entry = lines_until(child, "listening")
    assert (entry["address"], entry["service"], entry["level"]) == (f"127.0.0.1:{port}", "directory", "info")
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as response:
        assert b'kvferry_directory_workers{role="decode"} 0.0' in response.read()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch = directory_pb2_grpc.DirectoryServiceStub(channel).Watch(directory_pb2.WatchRequest(), timeout=20)
        assert next(iter(watch)).snapshot
        child.send_signal(signal.SIGTERM)
        # An open watch does not hold it up.
        assert child.wait(timeout=3) == 0
        watch.cancel()


def test_a_taken_port_is_one_sentence(process: tuple[subprocess.Popen[str], int, int]) -> None:
    child, port, _ = process
    lines_until(child, "listening")
    second = start("--listen", f"127.0.0.1:{port}")
    _, err = second.communicate(timeout=20)
    assert second.returncode == 1
    expected = f"address 127.0.0.1:{port} is in use by another process; choose another with --listen"
    assert err.strip() == f"python -m services.directory: {expected}"


def test_an_unknown_option_is_refused() -> None:
    child = start("--lisen", "127.0.0.1:1")
    _, err = child.communicate(timeout=20)
    assert child.returncode == 2
    assert err.count("\n") == 1
    assert "--lisen" in err


def test_health_follows_a_store_that_comes_and_goes(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--requirepass", "swordfish")
    password = tmp_path / "password"
    password.write_text("swordfish\n")
    port, metrics_port = free_port(), free_port()
    child = start(
        "--listen", f"127.0.0.1:{port}", "--metrics-port", str(metrics_port), "--store-password-file", str(password),
        KVFERRY_STORE=server.url,
    )  # fmt: skip

    def metrics() -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as response:
            return bytes(response.read())

    try:
        lines_until(child, "listening")
        assert b"kvferry_directory_available 0.0" in metrics()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
            stub = directory_pb2_grpc.DirectoryServiceStub(channel)
            assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as away:
                stub.Lookup(directory_pb2.LookupRequest(), timeout=5)
            assert away.value.code() is grpc.StatusCode.UNAVAILABLE
            server.start(password="swordfish")
            assert next(health).status == health_pb2.HealthCheckResponse.SERVING
            stub.Lookup(directory_pb2.LookupRequest(), timeout=5)
            assert b'kvferry_directory_workers{role="decode"} 0.0' in metrics()
            server.kill()
            assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
            health.cancel()
        assert b"swordfish" not in Path(f"/proc/{child.pid}/cmdline").read_bytes()
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=10) == 0
        assert child.stderr is not None
        assert "swordfish" not in child.stderr.read()
    finally:
        server.kill()
        child.kill()
        child.communicate(timeout=5)


@pytest.mark.parametrize(
    ("store", "status", "sentence"),
    [
        ("swordfish@nowhere", 2, "--store must be memory or begin with one of"),
        ("redis://me:swordfish@[::1/0", 1, "--store is not a URL"),
        ("redis://me:swordfish@127.0.0.1:PORT/0", 1, "check the user, the password"),
    ],
)
def test_a_store_that_cannot_be_is_one_sentence_without_its_password(
    redis_server: RedisServer, store: str, status: int, sentence: str
) -> None:
    child = start("--listen", f"127.0.0.1:{free_port()}", KVFERRY_STORE=store.replace("PORT", str(redis_server.port)))
    _, err = child.communicate(timeout=20)
    assert child.returncode == status
    assert sentence in err
    assert "Traceback" not in err
    assert "swordfish" not in err


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, services.directory.__main__; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, check=False).returncode == 0
