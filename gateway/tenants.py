"""Whose request it is: API keys and the tenants that they belong to."""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
# So many digits of a digest lead to the keys that are then compared in full.
_SHORT = 8


@dataclass(frozen=True, slots=True)
class Tenant:
    """``cache_salt`` goes into the hash of every KV block: tenants with unequal salts share no cached block, so none can
    learn, by a hit or by its time, what another has asked."""

    name: str
    cache_salt: bytes


EVERYBODY = Tenant("", b"")
"""Of a gateway without API keys."""


class KeyFileError(Exception):
    """The file of keys cannot be used; says where and why, and never shows a key."""


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: _Name
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Tenant(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    cache: _Name | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    key: tuple[_Key, ...] = ()
    tenant: dict[_Name, _Tenant] = {}


class Keyring:
    """The keys by the SHA-256 of their text.  That needs no slow hash: `kvferry key` makes keys of 256 random bits.

    A file of keys is TOML::

        [[key]]
        tenant = "search"
        sha256 = "<64 hexadecimal digits>"

        [tenant.search]       # only for tenants that share a prefix cache
        cache = "documents"   # with all tenants that name the same
    """

    def __init__(self, keys: Iterable[tuple[str, Tenant]]) -> None:
        """Pairs of a key's SHA-256, in hexadecimal digits, and its tenant."""
        self._by_short: dict[str, list[tuple[str, Tenant]]] = {}
        self.num_keys = 0
        for digest, tenant in keys:
            self._by_short.setdefault(digest[:_SHORT], []).append((digest, tenant))
            self.num_keys += 1

    @classmethod
    def parse(cls, text: str) -> Keyring:
        """Raises KeyFileError."""
        try:
            file = _File.model_validate(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise KeyFileError(f"not TOML: {error}") from error
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            raise KeyFileError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        digests = [key.sha256 for key in file.key]
        if len(set(digests)) < len(digests):
            raise KeyFileError("the same key is there twice")
        if strangers := file.tenant.keys() - {key.tenant for key in file.key}:
            raise KeyFileError(f"tenant.{min(strangers)}: no key belongs to this tenant")
        salts = {name: settings.cache for name, settings in file.tenant.items()}
        return cls((key.sha256, Tenant(key.tenant, _salt(key.tenant, salts.get(key.tenant)))) for key in file.key)

    def tenant_of(self, key: str) -> Tenant | None:
        """None for a key that is not there.  What is compared is digests, each in constant time."""
        digest = hashlib.sha256(key.encode()).hexdigest()
        found = None
        for known, tenant in self._by_short.get(digest[:_SHORT], ()):
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def _salt(tenant: str, cache: str | None) -> bytes:
    """A tenant's own cache and one that is shared never have the same salt, whatever their names."""
    return f"tenant:{tenant}".encode() if cache is None else f"cache:{cache}".encode()
