"""Probes need no certificate, and get nothing but an answer."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvferry._roles import CertificateRole as Role
from services.runtime.probes import serve_probes
from services.runtime.server import LIVE, add_standard_services, bind, create_inner_server, running, set_ready
from services.runtime.startup import StartupError
from tests.certificates import certificates, make_authority

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_guarded_services_health_is_told_in_the_clear(tmp_path: Path) -> None:
    port = free_port()
    server, credentials = create_inner_server(certificates(make_authority(tmp_path), Role.WORKER))
    health = await add_standard_services(server, ["test.Test"])
    guarded = bind(server, "127.0.0.1:0", credentials=credentials)
    async with (
        serve_probes(health, f"127.0.0.1:{guarded}", port),
        running(server, grace_s=0),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(service: str) -> int:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            return int(answer.status)

        assert [await status(name) for name in ("", "test.Test", LIVE)] == [SERVING] * 3
        await set_ready(health, ["test.Test"], False)
        assert [await status(name) for name in ("", "test.Test", LIVE)] == [NOT_SERVING, NOT_SERVING, SERVING]
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await status("another.Service")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as watched:
            await stub.Watch(health_pb2.HealthCheckRequest(), timeout=5).read()
        assert watched.value.code() is grpc.StatusCode.UNIMPLEMENTED
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as reflected:
            await reflection.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
            ).read()
        assert reflected.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_taken_port_is_one_sentence() -> None:
    server, _ = create_inner_server(None)
    health = await add_standard_services(server, [])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StartupError, match=r"is in use .* --health-port"):
            async with serve_probes(health, "127.0.0.1:1", taken.getsockname()[1]):
                pass
    async with serve_probes(health, "127.0.0.1:1", 0):
        pass
