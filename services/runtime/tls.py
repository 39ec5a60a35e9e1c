"""Certificates of services: where they are, what they are now, and which addresses want them (ADR 23)."""

from __future__ import annotations

import hashlib
import ipaddress
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from services.runtime.config import option
from services.runtime.startup import StartupError

_log = structlog.stdlib.get_logger(__name__)

CHECK_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """What every service is told about certificates.  All three files are given, or none."""

    tls_cert: Path | None = option(
        None, help="PEM file of this service's certificate, which names its role (`kvferry certs` makes it)"
    )
    tls_key: Path | None = option(None, help="PEM file of its private key")
    tls_ca: Path | None = option(None, help="PEM file of the cluster's own authority, which vouches for its peers")
    insecure: bool = option(False, help="listen beyond the loopback without certificates: whoever reaches a port is in")

    def certificates(self, *listen: str) -> Certificates | None:
        """None where no files are given.  Raises StartupError for files that cannot be used, and for an address of
        ``listen`` (host:port) beyond the loopback that nothing guards."""
        given = {"--tls-cert": self.tls_cert, "--tls-key": self.tls_key, "--tls-ca": self.tls_ca}
        if missing := [flag for flag, path in given.items() if path is None]:
            if len(missing) < len(given):
                raise StartupError(f"{' and '.join(missing)} must be given too: the three TLS files go together")
            for address in listen:
                if not self.insecure and not is_loopback(address.rpartition(":")[0]):
                    raise StartupError(
                        f"{address} is beyond the loopback, and without certificates whoever reaches it is let in; "
                        "give --tls-cert, --tls-key and --tls-ca, or say --insecure"
                    )
            return None
        assert self.tls_cert is not None
        assert self.tls_key is not None
        assert self.tls_ca is not None
        try:
            return Certificates(self.tls_cert, self.tls_key, self.tls_ca)
        except ValueError as error:
            raise StartupError(str(error)) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``.  Names other than localhost are not resolved, and are not."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class Pem:
    """What the files held at one moment: key and certificate belong together."""

    certificate: bytes
    key: bytes
    ca: bytes | None

    @property
    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], root_certificates=self.ca)

    @property
    def channel_credentials(self) -> grpc.ChannelCredentials:
        assert self.ca is not None, "None would trust every public authority"
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)


class Certificates:
    """The three files, or a door's certificate and key alone, read again when they have changed.  Files that cannot be
    used, as in the middle of being replaced, leave what was read before, and are told once.  Safe to use from any thread;
    ``current`` blocks for a few stats, and for reading these small files when they have changed."""

    def __init__(
        self, certificate: Path, key: Path, ca: Path | None, *, check_interval_s: float = CHECK_INTERVAL_S
    ) -> None:
        """``ca`` None: for a server that asks no certificate of its clients.  Raises ValueError, with the file's name."""
        self._certificate, self._key, self._ca = certificate, key, ca
        self._check_interval_s = check_interval_s
        self._lock = threading.Lock()
        self._checked_s = time.monotonic()
        self._seen = self._state()
        self._pem = self._read()

    @property
    def current(self) -> Pem:
        with self._lock:
            now = time.monotonic()
            if now - self._checked_s >= self._check_interval_s:
                self._checked_s = now
                if (state := self._state()) != self._seen:
                    self._seen = state
                    self._reload()
            return self._pem

    def server_credentials(self, *, require_client: bool) -> grpc.ServerCredentials:
        """Handshakes use the files as they are then.  With ``require_client`` only who shows a certificate of the
        authority comes in."""
        assert self._ca is not None or not require_client, "nobody vouches for clients"
        used = self.current

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Called by gRPC's threads before each handshake; None keeps what is in use."""
            nonlocal used
            pem = self.current
            if pem is used:
                return None
            used = pem
            return pem.server_configuration

        return grpc.dynamic_ssl_server_credentials(used.server_configuration, fetch, require_client)  # type: ignore[arg-type]

    def web_context(self) -> ssl.SSLContext:
        """For a door that asks no certificate of its clients.  Handshakes use the files as they are then.  Owned by one
        thread."""
        used, latest = self.current, self._web_context()

        def renew(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
            """Called at the beginning of each handshake, whether or not the client names a server."""
            nonlocal used, latest
            if (pem := self.current) is not used:
                with suppress(OSError):  # replaced once more in this moment: the next handshake sees it
                    latest, used = self._web_context(), pem
            connection.context = latest

        first = latest
        first.sni_callback = renew
        return first

    def _web_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._certificate, self._key, password=_no_password)
        context.set_alpn_protocols(["http/1.1"])
        return context

    def _reload(self) -> None:
        try:
            self._pem = self._read()
        except ValueError as error:
            _log.error("certificates_not_reloaded", error=str(error))
            return
        digest = hashlib.sha256(self._pem.certificate).hexdigest()[:16]
        _log.info("certificates_reloaded", file=str(self._certificate), sha256=digest)

    def _read(self) -> Pem:
        if (problem := _pair_error(self._certificate, self._key)) is not None:
            raise ValueError(problem)
        try:
            if self._ca is not None:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(self._ca)
            ca = None if self._ca is None else self._ca.read_bytes()
            return Pem(self._certificate.read_bytes(), self._key.read_bytes(), ca)
        except ssl.SSLError as error:
            raise ValueError(f"{self._ca} holds no certificate in PEM") from error
        except OSError as error:
            raise ValueError(f"{error.filename or self._ca} cannot be read: {error.strerror}") from error

    def _state(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_state(path) for path in (self._certificate, self._key, self._ca) if path is not None)


def _pair_error(certificate: Path, key: Path) -> str | None:
    for path in (certificate, key):
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return f"{certificate} and {key} are not a certificate in PEM and its unencrypted key ({reason})"
    return None


def _no_password() -> bytes:
    """OpenSSL would ask the terminal for it."""
    return b""


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
