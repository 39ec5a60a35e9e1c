"""docker/compose.yaml, up: what tests ask of it and do to it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILES = (ROOT / "docker/compose.yaml", Path(__file__).with_name("compose.test.yaml"))
PROJECT = "kvferry-test"
IMAGES = ("kvferry-gateway", "kvferry-worker")
WORKERS = ("prefill-1", "prefill-2", "decode-1", "decode-2")
SERVICES = ("directory-1", "directory-2", *WORKERS, "gateway-1", "gateway-2")
UP_S = 480.0  # on two busy cores; packing weights is the most of it
COMMAND_S = 60.0

# Workers share a PID namespace, so that of one is found by what it was told; who asks was told the same.
_KILL = """
import os, pathlib, sys
for process in pathlib.Path("/proc").glob("[0-9]*"):
    if int(process.name) != os.getpid() and sys.argv[1].encode() in (process / "cmdline").read_bytes().split(b"\\0"):
        if f"KVFERRY_WORKER_ID={sys.argv[2]}".encode() in (process / "environ").read_bytes().split(b"\\0"):
            os.kill(int(process.name), 9)
            sys.exit(f"killed {process.name}")
"""


def why_not() -> str | None:
    """Why no containers can be run here, in a line."""
    hint = "see tests/containers/engine.sh"
    if shutil.which("docker") is None:
        return f"no docker; {hint}"
    for what, command in (
        ("no engine answers", ("docker", "version")),
        ("no docker compose", ("docker", "compose", "version")),
        ("no images: make images", ("docker", "image", "inspect", *IMAGES)),
    ):
        if subprocess.run(command, capture_output=True, timeout=COMMAND_S, check=False).returncode != 0:
            return f"{what}; {hint}"
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Stack:
    """Every method blocks until done, and raises AssertionError with what docker wrote when it fails."""

    ports: dict[str, int] = field(
        default_factory=lambda: {
            name: _free_port() for name in ("GRPC_PORT", "HTTP_PORT", "GRPC_PORT_2", "HTTP_PORT_2")
        }
    )

    @property
    def addresses(self) -> str:
        """Of both gateways."""
        return f"127.0.0.1:{self.ports['GRPC_PORT']},127.0.0.1:{self.ports['GRPC_PORT_2']}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['HTTP_PORT']}"

    def up(self) -> None:
        self.compose("up", "--detach", "--no-build", "--wait", timeout_s=UP_S)

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "30", timeout_s=UP_S)

    def compose(self, *arguments: str, timeout_s: float = COMMAND_S) -> str:
        files = [argument for file in FILES for argument in ("--file", str(file))]
        return self._run(["docker", "compose", "--project-name", PROJECT, *files, *arguments], timeout_s)

    def left(self) -> list[str]:
        """Containers, networks and volumes that bear the project's label."""
        label = f"label=com.docker.compose.project={PROJECT}"
        kinds = (("ps", "--all"), ("network", "ls"), ("volume", "ls"))
        return [n for kind in kinds for n in self._run(["docker", *kind, "--quiet", "--filter", label]).split()]

    def python(self, service: str, code: str, *arguments: str) -> str:
        """What ``code`` prints in that service's container, as its user."""
        return self.compose("exec", "--no-TTY", service, "python", "-c", code, *arguments)

    def log(self, service: str) -> str:
        return self.compose("logs", "--no-color", "--no-log-prefix", service)

    def metrics(self, service: str) -> str:
        return self.python(
            service,
            "from urllib.request import urlopen; print(urlopen('http://127.0.0.1:9100/metrics').read().decode())",
        )

    def kill_worker(self, service: str) -> None:
        """By SIGKILL of its process, after which the engine starts it again; it would not after docker kill."""
        module = f"services.{service.partition('-')[0]}"
        container = f"{PROJECT}-{service}-1"
        done = self._start(["docker", "exec", container, "python", "-c", _KILL, module, service])
        # Who asked may have been ended with it.
        assert "killed" in done.stderr or done.returncode == 137, f"{service}'s process was not found: {done}"

    def is_healthy(self, service: str) -> bool:
        return bool(self.state(service)["Health"]["Status"] == "healthy")

    def state(self, service: str) -> dict[str, Any]:
        told = self._run(["docker", "inspect", "--format", "{{json .State}}", f"{PROJECT}-{service}-1"])
        state: dict[str, Any] = json.loads(told)
        return state

    def _run(self, command: Sequence[str], timeout_s: float = COMMAND_S) -> str:
        done = self._start(command, timeout_s)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _start(self, command: Sequence[str], timeout_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **{name: str(port) for name, port in self.ports.items()}}
        environment.setdefault("KVFERRY_KV_MEMORY", "128MiB")
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
