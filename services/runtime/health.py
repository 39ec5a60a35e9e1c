"""``python -m services.runtime.health``: asks a service of this machine for its gRPC health; ends with 0 when it serves.
The probe of images, which hold no tool of their own for that."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvferry._roles import CertificateRole
from services.runtime.channel import open_channel
from services.runtime.config import load, option
from services.runtime.server import split_address
from services.runtime.startup import StartupError
from services.runtime.tls import TlsOptions

_PROG = "python -m services.runtime.health"
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig(TlsOptions):
    """Whether a service serves, by its gRPC health: ends with 0 if so, else with 1 and a sentence."""

    listen: str = option("127.0.0.1:8470", help="host:port that the service was told to listen on")
    role: CertificateRole = option(
        CertificateRole.GATEWAY, help="what the service's certificate says; means nothing without certificates"
    )
    timeout_s: float = option(3.0, help="how long the answer may take, in seconds", minimum=0.1)


async def ask(config: HealthConfig) -> str | None:
    """None when the service serves, else why not, within ``config.timeout_s``.  Raises StartupError for options that
    cannot be used."""
    host, port = split_address(config.listen)
    address = f"{_ANY_HOST.get(host, f'[{host}]' if ':' in host else host)}:{port}"
    async with open_channel(address, certificates=config.certificates(), peer=config.role) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=config.timeout_s
            )
        except grpc.aio.AioRpcError as error:
            return f"{address}: {error.code().name}: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{address} is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def main() -> int:
    config = load(HealthConfig, sys.argv[1:], _PROG)
    try:
        problem = asyncio.run(ask(config))
    except StartupError as error:
        problem = str(error)
    if problem is not None:
        sys.stderr.write(f"{problem}\n")
    return int(problem is not None)


if __name__ == "__main__":
    sys.exit(main())
