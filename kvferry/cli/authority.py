"""A cluster's own certificate authority, as files in a folder (ADR 23)."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY = "ca"
_CA_LIFETIME = datetime.timedelta(days=3650)
# Clocks of other hosts may be behind.
_BEFORE = datetime.timedelta(minutes=5)


class AuthorityError(Exception):
    """The files do not allow it; one sentence that names the one at fault."""


def create(folder: Path) -> None:
    """Makes the authority: ``ca.pem``, and ``ca.key``, which its owner alone can read.  Raises AuthorityError rather than
    replace one."""
    if (folder / f"{AUTHORITY}.key").exists() or (folder / f"{AUTHORITY}.pem").exists():
        raise AuthorityError(
            f"{folder} holds an authority already; its certificates would be worth nothing with another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kvferry cluster authority")])
    certificate = (
        _builder(name, name, key.public_key(), _CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(folder, AUTHORITY, certificate, key)


def issue(folder: Path, name: str, *, dns_names: Sequence[str], hosts: Sequence[str], days: int) -> None:
    """Makes ``name``.pem and ``name``.key, or replaces them, each at once.  ``hosts``: names and addresses under which
    clients reach its holder.  Raises AuthorityError."""
    authority, authority_key = _read(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    alternatives = [*(x509.DNSName(dns_name) for dns_name in dns_names), *(_host(host) for host in hosts)]
    certificate = (
        _builder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            authority.subject,
            key.public_key(),
            datetime.timedelta(days=days),
        )
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write(folder, name, certificate, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + lifetime)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _read(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate((folder / f"{AUTHORITY}.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / f"{AUTHORITY}.key").read_bytes(), password=None)
    except OSError as error:
        raise AuthorityError(f"{error.filename}: {error.strerror}; kvferry certs init makes an authority") from error
    except (ValueError, TypeError) as error:
        raise AuthorityError(f"{folder}: {AUTHORITY}.pem or {AUTHORITY}.key is not what init made") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthorityError(f"{folder / AUTHORITY}.key is not an elliptic-curve key, as init makes them")
    return certificate, key


def _write(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _replace(folder / f"{name}.key", pem, 0o600)
    _replace(folder / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Whoever reads ``path`` meanwhile reads the old content or the new, and the key never lies open."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    new.replace(path)
