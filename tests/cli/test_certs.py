"""kvferry certs: what it leaves on disk."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvferry._roles import CertificateRole
from kvferry.cli import make_app
from kvferry.cli.service_tls import CertificateFolder


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(make_app(rich=False), ["certs", *arguments])
    return result.exit_code, result.output


def alternatives(path: Path) -> set[str]:
    decoded = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]
    return {value for _, value in decoded["subjectAltName"]}


def test_init_makes_all_that_a_cluster_needs_and_keys_are_their_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    assert run("init", str(folder))[0] == 0
    assert CertificateFolder(folder).missing() == []
    for key in folder.glob("*.key"):
        assert key.stat().st_mode & 0o777 == 0o600
    assert alternatives(folder / "worker.pem") == {"worker.kvferry.internal"}
    assert {"gateway.kvferry.internal", "localhost", "127.0.0.1"} <= alternatives(folder / "gateway.pem")
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{kind}" for name in ("ca", *(role.value for role in CertificateRole)) for kind in ("pem", "key")
    }


def test_an_authority_is_never_replaced(tmp_path: Path) -> None:
    run("init", str(tmp_path))
    before = (tmp_path / "ca.key").read_bytes()
    code, said = run("init", str(tmp_path))
    assert code == 1
    assert "holds an authority already" in said
    assert (tmp_path / "ca.key").read_bytes() == before


def test_issue_names_the_hosts_that_a_gateway_is_reached_by(tmp_path: Path) -> None:
    run("init", str(tmp_path))
    code, said = run(
        "issue", str(tmp_path), "gateway", "--host", "llm.example.org", "--host", "10.1.2.3", "--name", "gw1"
    )
    assert code == 0, said
    assert alternatives(tmp_path / "gw1.pem") == {"gateway.kvferry.internal", "llm.example.org", "10.1.2.3"}


@pytest.mark.parametrize("missing", ["ca.pem", "ca.key"])
def test_without_an_authority_nothing_is_issued(tmp_path: Path, missing: str) -> None:
    run("init", str(tmp_path))
    (tmp_path / missing).unlink()
    before = (tmp_path / "worker.pem").read_bytes()
    code, said = run("issue", str(tmp_path), "worker")
    assert code == 1
    assert missing in said
    assert (tmp_path / "worker.pem").read_bytes() == before
