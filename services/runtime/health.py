"""``python -m services.runtime.health``: asks a service of this machine, on its --health-port, whether it serves; ends with
0 when it does.  The probe of images, which hold no tool of their own for that: it imports little, since it runs often."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.config import load, option

_PROG = "python -m services.runtime.health"
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """Whether a service serves, by its gRPC health: ends with 0 if so, else with 1 and a sentence."""

    listen: str = option(
        "127.0.0.1:8470", help="host:port that the service was told to listen on; its port is not used"
    )
    health_port: int = option(help="port of gRPC health that it was told", minimum=1, maximum=65535)
    timeout_s: float = option(3.0, help="how long the answer may take, in seconds", minimum=0.1)


def ask(config: HealthConfig) -> str | None:
    """None when the service serves, else why not, within ``config.timeout_s``."""
    host = config.listen.rpartition(":")[0]
    address = f"{_ANY_HOST.get(host, host)}:{config.health_port}"
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=config.timeout_s
            )
        except grpc.RpcError as error:
            return f"{address}: {error.code().name}: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{address} is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def main() -> int:
    problem = ask(load(HealthConfig, sys.argv[1:], _PROG))
    if problem is not None:
        sys.stderr.write(f"{problem}\n")
    return int(problem is not None)


if __name__ == "__main__":
    sys.exit(main())
