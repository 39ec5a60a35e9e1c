"""Tenants' accounts that a gateway's processes share: a file for each, under a lock while it is looked at."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from gateway.quotas import UNLIMITED, Account, Bucket, Quota
from gateway.seat import Seat
from kvferry.errors import OverloadedError

# Of requests and of tokens the level, and when it was that.  Behind them each process's streams.
_BUCKETS = struct.Struct("<4d")
# A lock is held for microseconds, unless the system has taken the processor from who holds it, or stopped it.
LOCK_TIMEOUT_S = 0.05
_LOCK_RETRY_S = 0.0005
_BUSY_RETRY_S = 0.5


@dataclass(slots=True)
class _File:
    descriptor: int
    seat: Seat

    def read(self, quota: Quota) -> tuple[Account | None, list[int]]:
        """None for an account that nobody has opened."""
        streams = struct.Struct(f"<{self.seat.count}q")
        content = os.pread(self.descriptor, _BUCKETS.size + streams.size, 0)
        if len(content) < _BUCKETS.size + streams.size:
            return None, [0] * self.seat.count
        requests, requests_s, tokens, tokens_s = _BUCKETS.unpack_from(content)
        num_streams = list(streams.unpack_from(content, _BUCKETS.size))
        account = Account(
            quota, Bucket(quota.requests_per_minute, requests, requests_s),
            Bucket(quota.tokens_per_minute, tokens, tokens_s), sum(num_streams),
        )  # fmt: skip
        return account, num_streams

    def write(self, account: Account, num_streams: list[int]) -> None:
        """``num_streams`` as read; what has become of their sum is this process's."""
        num_streams[self.seat.number] += account.num_streams - sum(num_streams)
        buckets = (account.requests.level, account.requests.filled_s, account.tokens.level, account.tokens.filled_s)
        os.pwrite(self.descriptor, _BUCKETS.pack(*buckets) + struct.pack(f"<{len(num_streams)}q", *num_streams), 0)


@dataclass(slots=True)
class _Untold:
    """Of one tenant's streams that have ended."""

    num_streams: int = 0
    num_tokens: int = 0


class SharedQuotas:
    """Together the processes let in what one would, by the one clock of their host.  What a process that has ended had
    taken is used; its streams are not: its successor starts with none.  Blocks for at most ``lock_timeout_s``; then a
    request is refused, and an end is told with the next.  Owned by one thread."""

    def __init__(self, seat: Seat, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Takes over the seat's number."""
        self._seat = seat
        self._lock_timeout_s = lock_timeout_s
        self._untold: dict[str, _Untold] = {}
        seat.quotas.mkdir(mode=0o700, exist_ok=True)
        for path in seat.quotas.iterdir():
            with suppress(_BusyError), self._locked(path.name) as file:
                account, num_streams = file.read(UNLIMITED)
                if account is not None:
                    account.num_streams -= num_streams[seat.number]
                    file.write(account, num_streams)

    def begin(self, tenant: str, quota: Quota, num_prompt_tokens: int, now_s: float) -> None:
        if quota == UNLIMITED and not self._has_account(tenant):
            return
        try:
            with self._locked(tenant) as file:
                account, num_streams = file.read(quota)
                if account is None:
                    account = Account.opened(quota, now_s)
                try:
                    account.begin(quota, num_prompt_tokens, now_s)
                finally:
                    file.write(account, num_streams)
        except _BusyError:
            what = "another process of this gateway holds the tenant's account"
            raise OverloadedError(what, reason="QUOTA_BUSY", retry_after_s=_BUSY_RETRY_S) from None

    def end(self, tenant: str, num_output_tokens: int) -> None:
        if not self._has_account(tenant):
            return
        untold = self._untold.setdefault(tenant, _Untold())
        untold.num_streams += 1
        untold.num_tokens += num_output_tokens
        with suppress(_BusyError), self._locked(tenant):
            pass  # whoever locks tells

    def _has_account(self, tenant: str) -> bool:
        return tenant != "" and (self._seat.quotas / tenant).exists()

    @contextmanager
    def _locked(self, tenant: str) -> Iterator[_File]:
        """Tells first what is untold of the tenant.  Raises _BusyError."""
        descriptor = os.open(self._seat.quotas / tenant, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._lock(descriptor)
            file = _File(descriptor, self._seat)
            if untold := self._untold.pop(tenant, None):
                account, num_streams = file.read(UNLIMITED)
                if account is not None:
                    account.num_streams -= min(untold.num_streams, num_streams[self._seat.number])
                    account.tokens.level -= untold.num_tokens
                    file.write(account, num_streams)
            yield file
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        until_s = time.monotonic() + self._lock_timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= until_s:
                    raise _BusyError from None
                time.sleep(_LOCK_RETRY_S)


class _BusyError(Exception):
    """Another process held an account for too long."""
