"""The command line over a cluster of fakes: ``python -m tests.cli.fake_cluster serve ...``.

Its gateway is the scripted one, its other members only exist.  A model called "broken" has a gateway that cannot start,
one called "refusing" a gateway that has no answers.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from kvferry import errors
from kvferry.cli import cluster, main, ports
from kvferry.cli.members import ClusterConfig, Member, Plan, Role
from tests.sdk.fake_gateway import FakeGateway, answer, refuse

WAITS = (sys.executable, "-c", "import signal; signal.pause()")


def fake_plan(config: ClusterConfig, root: Path) -> Plan:
    for port, flag in ((config.grpc_port, "--grpc-port"), (config.http_port, "--http-port")):
        if port:
            ports.check_free(config.host, port, flag)
    port = config.grpc_port or ports.pick_free(1)[0]
    address, http_url = f"127.0.0.1:{port}", f"http://127.0.0.1:{config.http_port or 1}"
    gateway = (sys.executable, "-m", "tests.cli.fake_cluster", "as-gateway", str(port), config.model)
    members = (
        Member("directory", Role.DIRECTORY, WAITS, metrics_url="http://127.0.0.1:2/metrics"),
        Member("prefill-0", Role.PREFILL, WAITS, metrics_url="http://127.0.0.1:3/metrics"),
        Member("gateway", Role.GATEWAY, gateway, address, f"{http_url}/metrics", cwd=root),
    )
    return Plan(members, address, http_url)


def serve_scripted(port: int, model: str) -> None:
    if model == "broken":
        sys.exit("model broken: its weights are missing; name another with --model")
    script = refuse(errors.InternalError("no answer")) if model == "refusing" else answer("Light ", "scatters.")
    with FakeGateway(script, port=port):
        threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "as-gateway":
        serve_scripted(int(sys.argv[2]), sys.argv[3])
    else:
        cluster.plan = fake_plan  # type: ignore[attr-defined]
        main()
