"""The probe of images, against real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from kvferry._roles import CertificateRole as Role
from services.runtime.health import HealthConfig, ask
from services.runtime.server import add_standard_services, bind, create_inner_server, running
from services.runtime.tls import Certificates
from tests.certificates import certificates, make_authority

STATUSES = health_pb2.HealthCheckResponse


@asynccontextmanager
async def service(status: STATUSES.ServingStatus, shown: Certificates | None = None) -> AsyncIterator[int]:
    server, credentials = create_inner_server(shown)
    health = await add_standard_services(server, [])
    await health.set("", status)
    port = bind(server, "127.0.0.1:0", credentials=credentials)
    async with running(server, grace_s=0):
        yield port


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
async def test_a_service_that_serves_is_healthy_wherever_it_listens(host: str) -> None:
    async with service(STATUSES.SERVING) as port:
        assert await ask(HealthConfig(listen=f"{host}:{port}", timeout_s=20)) is None


async def test_a_service_that_serves_nobody_yet_is_not() -> None:
    async with service(STATUSES.NOT_SERVING) as port:
        problem = await ask(HealthConfig(listen=f"127.0.0.1:{port}", timeout_s=20))
    assert problem == f"127.0.0.1:{port} is NOT_SERVING"
    assert "UNAVAILABLE" in (await ask(HealthConfig(listen=f"127.0.0.1:{port}", timeout_s=20)) or "")


async def test_with_certificates_the_probe_shows_the_services_own(tmp_path: Path) -> None:
    folder = make_authority(tmp_path)
    async with service(STATUSES.SERVING, certificates(folder, Role.WORKER)) as port:
        tls = {
            "tls_cert": folder / "worker.pem",
            "tls_key": folder / "worker.key",
            "tls_ca": folder / "ca.pem",
            "listen": f"127.0.0.1:{port}",
            "timeout_s": 20,
        }
        assert await ask(HealthConfig(**tls, role=Role.WORKER)) is None
        assert await ask(HealthConfig(**tls, role=Role.DIRECTORY)) is not None
