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
HERE = Path(__file__).parent
FILES = (ROOT / "docker/compose.yaml", ROOT / "docker/compose.tls.yaml", HERE / "compose.test.yaml")
PROJECT = "kvferry-test"
IMAGES = ("kvferry-gateway", "kvferry-worker")
WORKERS = ("prefill-1", "prefill-2", "decode-1", "decode-2")
SERVICES = ("directory-1", "directory-2", *WORKERS, "gateway-1", "gateway-2")
ALL = ("store", *SERVICES)
OTHERS = ("pids", "prometheus")
UP_S = 480.0  # on two busy cores; packing weights is the most of it
COMMAND_S = 60.0

# Workers share a PID namespace, so that of one is found by what it was told; who asks was told the same.
_KILL = """
import os, pathlib, sys
for process in pathlib.Path("/proc").glob("[0-9]*"):
    if int(process.name) != os.getpid() and sys.argv[1].encode() in (process / "cmdline").read_bytes().split(b"\\0"):
        if f"KVFERRY_WORKER_ID={sys.argv[2]}".encode() in (process / "environ").read_bytes().split(b"\\0"):
            os.kill(int(process.name), 9)
"""

# Takes a container's network interfaces down, or up again, as a cable that is pulled does.
_SET_LINKS = """
import fcntl, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    for _, name in socket.if_nameindex():
        if name != "lo":
            request = struct.pack("16sh22x", name.encode(), 0)
            flags = struct.unpack("16sh22x", fcntl.ioctl(any_socket, 0x8913, request))[1]
            flags = flags | 1 if sys.argv[1] == "up" else flags & ~1
            fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", name.encode(), flags))
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
            name: _free_port() for name in ("GRPC_PORT", "HTTP_PORT", "GRPC_PORT_2", "HTTP_PORT_2", "PROMETHEUS_PORT")
        }
    )

    @property
    def addresses(self) -> str:
        """Of both gateways."""
        return f"127.0.0.1:{self.ports['GRPC_PORT']},127.0.0.1:{self.ports['GRPC_PORT_2']}"

    @property
    def http_url(self) -> str:
        return f"https://127.0.0.1:{self.ports['HTTP_PORT']}"

    @property
    def prometheus_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['PROMETHEUS_PORT']}"

    def authority(self) -> str:
        """The certificate that clients trust, as a user gets it."""
        return self.python("gateway-1", "print(open('/certs/gateway/ca.pem').read())")

    def up(self) -> None:
        self.compose("up", "--detach", "--no-build", "--wait", timeout_s=UP_S)

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "30", timeout_s=UP_S)

    def compose(self, *arguments: str, timeout_s: float = COMMAND_S, over: Sequence[Path] = ()) -> str:
        """``over``: further files."""
        files = [argument for file in (*FILES, *over) for argument in ("--file", str(file))]
        project = ["--project-name", PROJECT, "--profile", "metrics"]
        return self._run(["docker", "compose", *project, *files, *arguments], timeout_s)

    def left(self) -> list[str]:
        """Containers, networks and volumes that bear the project's label."""
        label = f"label=com.docker.compose.project={PROJECT}"
        kinds = (("ps", "--all"), ("network", "ls"), ("volume", "ls"))
        return [n for kind in kinds for n in self._run(["docker", *kind, "--quiet", "--filter", label]).split()]

    def python(self, service: str, code: str, *arguments: str) -> str:
        """What ``code`` prints in that service's container, as its user."""
        return self.compose("exec", "--no-TTY", service, "python", "-c", code, *arguments)

    def execute(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Whatever its status."""
        return self._try(["docker", "exec", f"{PROJECT}-{service}-1", *command])

    def labels(self, image: str) -> dict[str, str]:
        told: dict[str, str] = json.loads(
            self._run(["docker", "image", "inspect", "--format", "{{json .Config.Labels}}", image])
        )
        return told

    def image_nbytes(self, image: str) -> int:
        return int(self._run(["docker", "image", "inspect", "--format", "{{.Size}}", image]))

    def log(self, service: str) -> str:
        return self.compose("logs", "--no-color", "--no-log-prefix", service)

    def metrics(self, service: str) -> str:
        return self.python(
            service,
            "from urllib.request import urlopen; print(urlopen('http://127.0.0.1:9100/metrics').read().decode())",
        )

    def kill_worker(self, service: str) -> None:
        """By SIGKILL of its process, after which the engine starts it again; it would not after docker kill.  Nobody waits
        for who does it: it ends with the container, and docker may not notice."""
        module = f"services.{service.partition('-')[0]}"
        self._run(["docker", "exec", "--detach", f"{PROJECT}-{service}-1", "python", "-c", _KILL, module, service])

    def stop(self, service: str) -> int:
        """By SIGTERM; the status it ended with, 137 when it had to be killed."""
        self.compose("stop", service)
        return int(self.state(service)["ExitCode"])

    def start(self, service: str) -> None:
        """That one alone: compose would go through all that it depends on."""
        self._run(["docker", "start", f"{PROJECT}-{service}-1"])

    def cut_off(self, service: str) -> None:
        """Nobody reaches it any more, nor it anybody, and neither is told."""
        self._set_links(service, "down")

    def mend(self, service: str) -> None:
        """Undoes cut_off."""
        self._set_links(service, "up")

    def _set_links(self, service: str, to: str) -> None:
        self._run(
            ["docker", "run", "--rm", "--network", f"container:{PROJECT}-{service}-1", "--user", "0", "--no-healthcheck",
             "--cap-drop", "ALL", "--cap-add", "NET_ADMIN", "--entrypoint", "python", IMAGES[0], "-c", _SET_LINKS, to]
        )  # fmt: skip

    def is_healthy(self, service: str) -> bool:
        """Asked now, as the engine does from time to time."""
        return self.execute(service, "python", "-m", "services.runtime.health").returncode == 0

    def state(self, service: str) -> dict[str, Any]:
        told = self._run(["docker", "inspect", "--format", "{{json .State}}", f"{PROJECT}-{service}-1"])
        state: dict[str, Any] = json.loads(told)
        return state

    def _run(self, command: Sequence[str], timeout_s: float = COMMAND_S) -> str:
        done = self._try(command, timeout_s)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _try(self, command: Sequence[str], timeout_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **{name: str(port) for name, port in self.ports.items()}}
        environment.setdefault("KVFERRY_KV_MEMORY", "128MiB")
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
