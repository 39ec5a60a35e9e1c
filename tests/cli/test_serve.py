"""serve and demo as real processes, over a cluster of fakes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from typer.testing import CliRunner

import kvferry
from kvferry.cli import make_app
from kvferry.cli.cluster import LocalCluster
from tests.cli.test_cluster import ends

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "tests.cli.fake_cluster"]


@contextmanager
def serving(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    arguments = ["serve", "--grpc-port", "0", "--http-port", "0", "--log-dir", str(tmp_path)]
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process, process.stdout, process.stderr
        finally:
            process.kill()


def lines_until(stream: IO[str], words: str) -> str:
    seen = ""
    for line in stream:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"{words!r} not in {seen!r}")


def pids_in(text: str) -> dict[str, int]:
    return {name: int(pid) for name, pid in re.findall(r"(\S+) is ready after .* \(pid (\d+)\)", text)}


def test_serve_announces_restarts_and_stops_cleanly(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, stdout, stderr):
        announced = lines_until(stdout, "Ctrl-C stops everything.")
        started = lines_until(stderr, "gateway is ready")
        pids = pids_in(started)
        assert started.startswith("starting directory, prefill-0, gateway\n")
        assert list(pids) == ["directory", "prefill-0", "gateway"]
        found = re.search(r"gRPC +(\S+)", announced)
        assert found is not None
        address = found[1]
        assert f"kvferry chat --address {address}" in announced
        assert "http://127.0.0.1:3/metrics  (prefill-0)" in announced
        with kvferry.Client(address) as client:
            assert client.generate("x").result().text == "Light scatters."

        os.kill(pids["prefill-0"], signal.SIGKILL)
        assert "prefill-0 was killed by SIGKILL; starting it again in 0.5 s\n" in lines_until(stderr, "prefill-0")
        assert re.search(r"prefill-0 was started again \(pid \d+\)", lines_until(stderr, "started again"))

        process.send_signal(signal.SIGINT)
        told = stderr.read()
        assert process.wait(20) == 0
        assert [line.partition(" ")[0] for line in told.splitlines() if "stopped" in line] == [
            "gateway",
            "prefill-0",
            "directory",
        ]
        assert all(ends(pid) for pid in pids.values())


def test_sigterm_stops_serve_too(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, stdout, stderr):
        lines_until(stdout, "Ctrl-C stops everything.")
        pids = pids_in(lines_until(stderr, "gateway is ready"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert all(ends(pid) for pid in pids.values())


def test_being_stopped_while_it_announces_is_a_clean_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started:
        members = ()
        make_worker = None
        stopped = False

        def start(self) -> None: ...

        def doing(self) -> dict[str, str]:
            return {}

        def stop(self) -> None:
            self.stopped = True

    def announce(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    cluster = Started()
    monkeypatch.setattr(LocalCluster, "from_config", lambda *_, **__: cluster)
    monkeypatch.setattr(sys.modules["kvferry.cli.serve"], "_announce", announce)
    assert CliRunner().invoke(make_app(rich=False), ["serve"]).exit_code == 0
    assert cluster.stopped


def test_a_taken_port_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", "--http-port", port, "--grpc-port", "0", "--log-dir", str(tmp_path / "logs"))
    assert done.returncode == 1
    assert done.stderr == (
        f"kvferry: port {port} on 127.0.0.1 is taken by another process; stop it or choose another with --http-port\n"
    )
    assert not (tmp_path / "logs").exists()


def test_equal_ports_are_wrong_usage() -> None:
    done = run("serve", "--http-port", "9000", "--grpc-port", "9000")
    assert done.returncode == 2
    assert "both" in done.stderr


def test_a_member_that_cannot_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    done = run("serve", "--grpc-port", "0", "--http-port", "0", "--model", "broken", "--log-dir", str(tmp_path))
    assert done.returncode == 1
    told = done.stderr.splitlines()
    assert told[-2:] == [
        "  | model broken: its weights are missing; name another with --model",
        f"kvferry: gateway ended with exit status 1 during the start; log: {tmp_path}/gateway.log",
    ]


def test_demo_answers_shows_the_timeline_and_stops(tmp_path: Path) -> None:
    done = run("demo", "Why is the sky blue?", "--log-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    answer, _, timeline = done.stdout.partition("timeline\n")
    assert answer == "Light scatters.\n\n"
    assert "exposed transfer" in timeline
    assert "> Why is the sky blue?" in done.stderr
    assert "directory stopped" in done.stderr.splitlines()[-1]
    assert all(ends(pid) for pid in pids_in(done.stderr).values())


def test_demo_fails_when_there_is_no_answer(tmp_path: Path) -> None:
    done = run("demo", "--model", "refusing", "--log-dir", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.endswith("kvferry: no answer\n")
    assert all(ends(pid) for pid in pids_in(done.stderr).values())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
