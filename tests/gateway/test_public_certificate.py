"""The gateway's doors with a certificate of their own, beside the cluster's: a real process, and clients of both doors."""

from __future__ import annotations

import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from gateway.config import GatewayConfig
from kvferry import Client, TlsConfig, UnavailableError
from kvferry.cli import authority
from kvferry.cli.members import clone_root
from kvferry.cli.ports import pick_free
from services.runtime.startup import StartupError
from tests.certificates import HOSTS, make_authority

PATIENCE_S = 60


def make_public(folder: Path) -> Path:
    """What a public authority would give: a name, and no role."""
    authority.create(folder)
    authority.issue(folder, "door", dns_names=[], hosts=HOSTS, days=1)
    return folder


def shown(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=10)


def test_clients_are_shown_the_public_certificate_and_its_successor(tmp_path: Path) -> None:
    cluster, public = make_authority(tmp_path / "cluster"), make_public(tmp_path / "public")
    grpc_port, http_port, nobody = pick_free(3)
    flags = {
        "listen": f"127.0.0.1:{grpc_port}", "http-listen": f"127.0.0.1:{http_port}", "directory": f"127.0.0.1:{nobody}",
        "tls-cert": cluster / "gateway.pem", "tls-key": cluster / "gateway.key", "tls-ca": cluster / "ca.pem",
        "public-cert": public / "door.pem", "public-key": public / "door.key",
    }  # fmt: skip
    command = [sys.executable, "-m", "gateway", *(f"--{name}={value}" for name, value in flags.items())]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, cwd=clone_root(), stdout=log, stderr=log) as process,
    ):
        try:
            until_s = time.monotonic() + PATIENCE_S
            while "ready" not in (tmp_path / "log").read_text():
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until_s
                time.sleep(0.1)
            with Client(f"127.0.0.1:{grpc_port}", tls=TlsConfig(public / "ca.pem")) as client:
                assert client.cluster().workers == ()
            trusting = ssl.create_default_context(cafile=public / "ca.pem")
            assert httpx.get(f"https://127.0.0.1:{http_port}/health", verify=trusting).status_code == 503

            distrustful = Client(f"127.0.0.1:{grpc_port}", tls=TlsConfig(cluster / "ca.pem"), max_attempts=1)
            with distrustful as client, pytest.raises(UnavailableError):
                client.cluster()
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                httpx.get(
                    f"https://127.0.0.1:{http_port}/", verify=ssl.create_default_context(cafile=cluster / "ca.pem")
                )

            before = (public / "door.pem").read_text()
            assert shown(grpc_port) == shown(http_port) == before
            authority.issue(public, "door", dns_names=[], hosts=HOSTS, days=1)
            after = (public / "door.pem").read_text()
            while shown(grpc_port) != after or shown(http_port) != after:
                assert time.monotonic() < until_s
                time.sleep(0.2)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def test_the_public_pair_stands_beside_the_clusters_or_alone(tmp_path: Path) -> None:
    cluster, public = make_authority(tmp_path / "cluster"), make_public(tmp_path / "public")
    pair = {"public_cert": public / "door.pem", "public_key": public / "door.key"}
    own = {"tls_cert": cluster / "gateway.pem", "tls_key": cluster / "gateway.key", "tls_ca": cluster / "ca.pem"}
    open_to_all = {"listen": "0.0.0.0:1", "http_listen": "0.0.0.0:2"}

    inner, outer = GatewayConfig(**pair, **own, **open_to_all).both_certificates()  # type: ignore[arg-type]
    assert inner is not None
    assert outer is not None
    assert (inner.current.certificate, outer.current.certificate) == (
        (cluster / "gateway.pem").read_bytes(), (public / "door.pem").read_bytes()
    )  # fmt: skip
    inner, outer = GatewayConfig(**own).both_certificates()  # type: ignore[arg-type]
    assert inner is outer is not None
    inner, outer = GatewayConfig(**pair, **open_to_all).both_certificates()  # type: ignore[arg-type]
    assert inner is None
    assert outer is not None
    with pytest.raises(StartupError, match="beyond the loopback"):
        GatewayConfig(**open_to_all).both_certificates()
    for half in pair:
        with pytest.raises(StartupError, match="must be given too: a certificate and its key"):
            GatewayConfig(**{half: pair[half]}).both_certificates()
    with pytest.raises(StartupError, match=r"door\.pem and .*gateway\.key are not"):
        GatewayConfig(public_cert=public / "door.pem", public_key=cluster / "gateway.key").both_certificates()


def test_a_public_pair_vouches_for_nobody(tmp_path: Path) -> None:
    """It opens no channel to a service, and no server takes clients by it."""
    public = make_public(tmp_path)
    _, outer = GatewayConfig(public_cert=public / "door.pem", public_key=public / "door.key").both_certificates()
    assert outer is not None
    with pytest.raises(AssertionError):
        outer.server_credentials(require_client=True)
    with pytest.raises(AssertionError):
        _ = outer.current.channel_credentials
