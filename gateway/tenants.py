"""Whose request it is: API keys and the tenants that they belong to."""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.quotas import UNLIMITED, Quota

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Positive = Annotated[float, Field(gt=0)]
# So many digits of a digest lead to the keys that are then compared in full.
_SHORT = 8


@dataclass(frozen=True, slots=True)
class Tenant:
    """``cache_salt`` goes into the hash of every KV block: tenants with unequal salts share no cached block, so none can
    learn, by a hit or by its time, what another has asked.  Where requests must wait, a tenant of twice the ``weight`` is
    served twice as many tokens."""

    name: str
    cache_salt: bytes
    weight: float = 1.0
    quota: Quota = UNLIMITED


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
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    requests_per_minute: _Positive = inf
    tokens_per_minute: _Positive = inf
    max_streams: Annotated[int, Field(ge=1)] | None = None

    @property
    def quota(self) -> Quota:
        return Quota(self.requests_per_minute, self.tokens_per_minute, self.max_streams or inf)


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

        [tenant.search]              # each line may be left out
        cache = "documents"          # a prefix cache shared with all tenants that name the same
        weight = 2                   # served twice as much as others where requests must wait
        requests_per_minute = 600
        tokens_per_minute = 200000   # of prompts and answers
        max_streams = 16             # requests at a time
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
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            raise KeyFileError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (ValueError, RecursionError) as error:  # tomllib passes on what int() and deep nesting raise
            raise KeyFileError(f"not TOML: {error}") from error
        digests = [key.sha256 for key in file.key]
        if len(set(digests)) < len(digests):
            raise KeyFileError("the same key is there twice")
        if strangers := file.tenant.keys() - {key.tenant for key in file.key}:
            raise KeyFileError(f"tenant.{min(strangers)}: no key belongs to this tenant")
        return cls((key.sha256, _to_tenant(key.tenant, file.tenant.get(key.tenant, _Tenant()))) for key in file.key)

    def tenant_of(self, key: str) -> Tenant | None:
        """None for a key that is not there.  What is compared is digests, each in constant time."""
        digest = hashlib.sha256(key.encode()).hexdigest()
        found = None
        for known, tenant in self._by_short.get(digest[:_SHORT], ()):
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def _to_tenant(name: str, settings: _Tenant) -> Tenant:
    return Tenant(name, _salt(name, settings.cache), settings.weight, settings.quota)


def _salt(tenant: str, cache: str | None) -> bytes:
    """A tenant's own cache and one that is shared never have the same salt, whatever their names."""
    return f"tenant:{tenant}".encode() if cache is None else f"cache:{cache}".encode()
