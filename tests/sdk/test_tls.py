"""TLS, with certificates made on the spot."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import kvferry
from tests.sdk.fake_gateway import FakeGateway, answer


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("needs the openssl command")
    return key, certificate


@pytest.fixture(params=[False, True], ids=["server certificate", "mutual"])
def secure(pem: tuple[Path, Path], request: pytest.FixtureRequest) -> Iterator[tuple[str, kvferry.TlsConfig]]:
    """The address of a TLS server, and what a client needs to reach it."""
    key, certificate = pem
    pair = (key.read_bytes(), certificate.read_bytes())
    mutual: bool = request.param
    credentials = grpc.ssl_server_credentials([pair], certificate.read_bytes() if mutual else None, mutual)
    with FakeGateway(answer("Hi"), tls=credentials) as gateway:
        yield (
            gateway.address,
            kvferry.TlsConfig(certificate, str(key), certificate.read_bytes())
            if mutual
            else kvferry.TlsConfig(certificate.read_bytes()),
        )


def test_blocking_client(secure: tuple[str, kvferry.TlsConfig]) -> None:
    address, tls = secure
    with kvferry.Client(address, tls=tls) as client:
        assert client.generate("x").result().text == "Hi"
        assert client.health() is kvferry.HealthStatus.SERVING


async def test_asyncio_client(secure: tuple[str, kvferry.TlsConfig]) -> None:
    address, tls = secure
    async with kvferry.AsyncClient(address, tls=tls) as client:
        assert (await client.generate("x").result()).text == "Hi"


@pytest.mark.parametrize("tls", [None, kvferry.TlsConfig()])
def test_a_client_that_does_not_trust_the_server_is_not_served(
    secure: tuple[str, kvferry.TlsConfig], tls: kvferry.TlsConfig | None
) -> None:
    with kvferry.Client(secure[0], tls=tls, timeout=5, max_attempts=1) as client, pytest.raises(kvferry.Error):
        client.models()


def test_missing_and_half_given_parts_are_named() -> None:
    with pytest.raises(kvferry.InvalidRequestError, match=r"root_certificates: /nowhere.pem cannot be read"):
        kvferry.Client("127.0.0.1:1", tls=kvferry.TlsConfig("/nowhere.pem"))
    with pytest.raises(kvferry.InvalidRequestError, match="together"):
        kvferry.Client("127.0.0.1:1", tls=kvferry.TlsConfig(private_key=b"x"))


def test_the_private_key_is_not_shown() -> None:
    assert "secret" not in repr(kvferry.TlsConfig(private_key=b"secret", certificate_chain=b"chain"))
