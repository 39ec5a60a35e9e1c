"""Lets in who has an API key, and says whose it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from gateway.tenants import EVERYBODY, KeyFileError, Keyring, Tenant
from kvferry.errors import UnauthenticatedError

log = structlog.get_logger(__name__)

RELOAD_INTERVAL_S = 2.0

_SCHEME = "bearer "


class Doorkeeper:
    """With ``keys`` None everybody comes in."""

    def __init__(self, keys: Keyring | None = None) -> None:
        self.keys = keys

    def admit(self, authorization: str | None) -> Tenant:
        """``authorization``: the header's or metadata's value.  Raises UnauthenticatedError."""
        if self.keys is None:
            return EVERYBODY
        if authorization is None:
            raise UnauthenticatedError(
                "this gateway wants an API key, as 'authorization: Bearer KEY' (Client(api_key=...), KVFERRY_API_KEY)",
                reason="MISSING_API_KEY",
            )
        if not authorization.lower().startswith(_SCHEME):
            raise UnauthenticatedError("authorization: give the API key as 'Bearer KEY'", reason="INVALID_API_KEY")
        tenant = self.keys.tenant_of(authorization[len(_SCHEME) :].strip(" \t"))
        if tenant is None:
            raise UnauthenticatedError("this gateway does not know that API key", reason="INVALID_API_KEY")
        return tenant


def read_keys(path: Path) -> Keyring:
    """Raises KeyFileError, with the file's name."""
    try:
        return Keyring.parse(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from error


async def follow(doorkeeper: Doorkeeper, path: Path, interval_s: float = RELOAD_INTERVAL_S) -> None:
    """Takes over the file's keys whenever it has changed, until cancelled.  A file that cannot be used, or is away, leaves
    the keys as they are, and is told once."""
    seen = _state(path)
    while True:
        await asyncio.sleep(interval_s)
        if (state := _state(path)) == seen:
            continue
        seen = state
        try:
            doorkeeper.keys = await asyncio.to_thread(read_keys, path)
            log.info("keys_reloaded", keys=doorkeeper.keys.num_keys)
        except KeyFileError as error:
            log.error("keys_not_reloaded", error=str(error))


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
