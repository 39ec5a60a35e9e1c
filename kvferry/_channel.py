"""How both clients open their channel: options, credentials, what goes with every call."""

from __future__ import annotations

from pathlib import Path

import grpc

from kvferry import errors
from kvferry._version import __version__
from kvferry.types import TlsConfig

HEALTH_CHECK = "/grpc.health.v1.Health/Check"


def options(keepalive_s: float) -> list[tuple[str, str | int]]:
    """Pings find a dead peer within ``keepalive_s`` + 10 s while a call is open.  Where it is refused, a connection
    is tried for every 100 to 360 ms (grpc draws a fifth more or less), however long nobody has been there: between two
    tries all calls fail at once, and the attempts of a call go on for 0.7 s at least, unless fewer are asked for.  A
    connection may take 3 s to be made, which is what grpc takes the least backoff for: a few round trips to the other
    side of the world, or to a busy host."""
    return [
        ("grpc.primary_user_agent", f"kvferry/{__version__}"),
        ("grpc.keepalive_time_ms", int(keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 3_000),
        ("grpc.max_reconnect_backoff_ms", 300),
    ]


def credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    if (tls.private_key is None) != (tls.certificate_chain is None):
        raise errors.InvalidRequestError("TlsConfig needs private_key and certificate_chain together, or neither")
    return grpc.ssl_channel_credentials(
        _pem(tls.root_certificates, "root_certificates"),
        _pem(tls.private_key, "private_key"),
        _pem(tls.certificate_chain, "certificate_chain"),
    )


def metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    if api_key is None:
        return ()
    if not api_key or not api_key.isascii() or not api_key.isprintable():
        raise errors.InvalidRequestError("api_key must be printable ASCII")
    return (("authorization", f"Bearer {api_key}"),)


def _pem(source: str | Path | bytes | None, name: str) -> bytes | None:
    if source is None or isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise errors.InvalidRequestError(f"TlsConfig.{name}: {source} cannot be read: {error.strerror}") from error
