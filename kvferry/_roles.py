"""What a certificate makes of its holder (ADR 23)."""

from __future__ import annotations

from enum import Enum


class CertificateRole(Enum):
    """Named by a DNS name among a certificate's subject alternative names: worker.kvferry.internal."""

    GATEWAY = "gateway"
    WORKER = "worker"
    DIRECTORY = "directory"
    OPERATOR = "operator"

    @property
    def dns_name(self) -> str:
        return f"{self.value}.kvferry.internal"
