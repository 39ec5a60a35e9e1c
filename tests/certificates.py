"""Certificates of a cluster, made for a test."""

from __future__ import annotations

from pathlib import Path

from kvferry._roles import CertificateRole as Role
from kvferry.cli import authority
from services.runtime.tls import Certificates

HOSTS = ("localhost", "127.0.0.1")


def make_authority(folder: Path) -> Path:
    """An authority and a certificate of each role."""
    authority.create(folder)
    for role in Role:
        reissue(folder, role)
    return folder


def reissue(folder: Path, role: Role) -> None:
    authority.issue(folder, role.value, dns_names=[role.dns_name], hosts=HOSTS, days=1)


def certificates(folder: Path, role: Role, *, ca: Path | None = None) -> Certificates:
    """Looks at its files at each use, where a service does so once a second."""
    return Certificates(
        folder / f"{role.value}.pem", folder / f"{role.value}.key", ca or folder / "ca.pem", check_interval_s=0
    )
