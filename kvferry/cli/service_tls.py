"""How the command line reaches services that ask for certificates (ADR 23)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvferry import _channel
from kvferry._roles import CertificateRole
from kvferry.types import TlsConfig


@dataclass(frozen=True, slots=True)
class CertificateFolder:
    """What ``kvferry certs init`` makes."""

    path: Path

    @property
    def ca(self) -> Path:
        return self.path / "ca.pem"

    def flags(self, role: CertificateRole) -> dict[str, str]:
        """A service's own."""
        certificate, key = self.pair(role)
        return {"--tls-cert": str(certificate), "--tls-key": str(key), "--tls-ca": str(self.ca)}

    def pair(self, role: CertificateRole) -> tuple[Path, Path]:
        return self.path / f"{role.value}.pem", self.path / f"{role.value}.key"

    def operator(self) -> TlsConfig:
        certificate, key = self.pair(CertificateRole.OPERATOR)
        return TlsConfig(root_certificates=self.ca, certificate_chain=certificate, private_key=key)

    def missing(self) -> list[Path]:
        """Files without which no cluster starts."""
        wanted = [self.ca, *(path for role in CertificateRole for path in self.pair(role))]
        return [path for path in wanted if not path.is_file()]


def open_service_channel(
    address: str, tls: TlsConfig | None, peer: CertificateRole, options: Sequence[tuple[str, int | str]] = ()
) -> grpc.Channel:
    """To a service itself; with ``tls`` to none but a ``peer``, wherever it runs.  The caller closes it.  Raises
    InvalidRequestError for files that cannot be read."""
    if tls is None:
        return grpc.insecure_channel(address, options)
    named = (*options, ("grpc.ssl_target_name_override", peer.dns_name))
    return grpc.secure_channel(address, _channel.credentials(tls), named)
