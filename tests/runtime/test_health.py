"""The probe of images, against the port that services open for probes."""

from __future__ import annotations

import asyncio

import pytest
from grpc_health.v1 import health, health_pb2

from services.runtime.health import HealthConfig, ask
from services.runtime.probes import serve_probes
from tests.runtime.test_probes import free_port

STATUSES = health_pb2.HealthCheckResponse


async def asked(listen: str, status: STATUSES.ServingStatus) -> str | None:
    servicer = health.aio.HealthServicer()
    await servicer.set("", status)
    port = free_port()
    async with serve_probes(servicer, listen, port):
        problem = await asyncio.to_thread(ask, HealthConfig(listen=listen, health_port=port, timeout_s=20))
    return problem and problem.replace(str(port), "PORT")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
async def test_a_service_that_serves_is_healthy_wherever_it_listens(host: str) -> None:
    assert await asked(f"{host}:8470", STATUSES.SERVING) is None


async def test_a_service_that_serves_nobody_yet_is_not() -> None:
    assert await asked("127.0.0.1:8470", STATUSES.NOT_SERVING) == "127.0.0.1:PORT is NOT_SERVING"


def test_nor_is_one_that_is_not_there() -> None:
    problem = ask(HealthConfig(listen="127.0.0.1:8470", health_port=free_port(), timeout_s=20))
    assert problem is not None
    assert "UNAVAILABLE" in problem
