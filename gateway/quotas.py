"""What a tenant may use, as buckets that fill by the second.  Pure: the caller says what time it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from kvferry.errors import OverloadedError

_MINUTE_S = 60.0
# A stream ends when it ends; when to look again is a guess.
_STREAM_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Quota:
    """Infinite where nothing is said.  Tokens are those of prompts and of answers."""

    requests_per_minute: float = inf
    tokens_per_minute: float = inf
    max_streams: float = inf


UNLIMITED = Quota()


@dataclass(slots=True)
class Bucket:
    """Holds a minute's worth at most.  May be overdrawn: what it owes is filled up first."""

    per_minute: float
    level: float
    filled_s: float

    def fill(self, now_s: float) -> None:
        gained = max(0.0, now_s - self.filled_s) * self.per_minute / _MINUTE_S
        self.level = min(self.per_minute, self.level + gained)
        self.filled_s = max(self.filled_s, now_s)

    def seconds_until(self, wanted: float) -> float:
        """Until it holds so much; or is full, for more than it can ever hold."""
        return max(0.0, min(wanted, self.per_minute) - self.level) * _MINUTE_S / self.per_minute


@dataclass(slots=True)
class Account:
    """What one tenant has used of its quota.  A prompt is paid when its request begins, an answer when it has ended: nobody
    knows its length before.  So an account may be overdrawn, by the answers of as many streams as it may have, and admits
    nothing until it is not.  A prompt larger than a minute's tokens goes when the account is full."""

    quota: Quota
    requests: Bucket
    tokens: Bucket
    num_streams: int = 0

    @classmethod
    def opened(cls, quota: Quota, now_s: float) -> Account:
        """With all that the quota gives."""
        requests = Bucket(quota.requests_per_minute, quota.requests_per_minute, now_s)
        return cls(quota, requests, Bucket(quota.tokens_per_minute, quota.tokens_per_minute, now_s))

    def begin(self, quota: Quota, num_prompt_tokens: int, now_s: float) -> None:
        """As ``Quotas.begin``."""
        self._follow(quota, now_s)
        if self.num_streams >= quota.max_streams:
            raise _exceeded(f"{self.num_streams} requests at a time", _STREAM_RETRY_S)
        if (wait_s := self.requests.seconds_until(1)) > 0:
            raise _exceeded(f"{quota.requests_per_minute:g} requests a minute", wait_s)
        if (wait_s := self.tokens.seconds_until(num_prompt_tokens)) > 0:
            raise _exceeded(f"{quota.tokens_per_minute:g} tokens a minute", wait_s)
        self.requests.level -= 1
        self.tokens.level -= num_prompt_tokens
        self.num_streams += 1

    def end(self, num_output_tokens: int) -> None:
        self.num_streams -= self.num_streams > 0
        self.tokens.level -= num_output_tokens

    def _follow(self, quota: Quota, now_s: float) -> None:
        """A changed quota holds at once; what was used stays used."""
        if quota != self.quota:
            self.quota = quota
            self.requests.per_minute, self.tokens.per_minute = quota.requests_per_minute, quota.tokens_per_minute
        for bucket in (self.requests, self.tokens):
            if bucket.per_minute == inf:
                bucket.level, bucket.filled_s = inf, now_s
            else:
                bucket.level = min(bucket.level, bucket.per_minute)
                bucket.fill(now_s)


class Quotas(Protocol):
    """Every tenant's account."""

    def begin(self, tenant: str, quota: Quota, num_prompt_tokens: int, now_s: float) -> None:
        """Counts one more stream.  Raises OverloadedError (QUOTA_EXCEEDED), and counts nothing, when the tenant has used up
        what it may."""

    def end(self, tenant: str, num_output_tokens: int) -> None:
        """Of a stream that ``begin`` let in."""


@dataclass(slots=True)
class QuotaBook:
    """The accounts of a gateway that is one process."""

    _accounts: dict[str, Account] = field(default_factory=dict)

    def begin(self, tenant: str, quota: Quota, num_prompt_tokens: int, now_s: float) -> None:
        account = self._accounts.get(tenant)
        if account is None:
            if quota == UNLIMITED:
                return
            account = self._accounts[tenant] = Account.opened(quota, now_s)
        account.begin(quota, num_prompt_tokens, now_s)

    def end(self, tenant: str, num_output_tokens: int) -> None:
        if account := self._accounts.get(tenant):
            account.end(num_output_tokens)


def _exceeded(what: str, wait_s: float) -> OverloadedError:
    return OverloadedError(f"this tenant may have {what}", reason="QUOTA_EXCEEDED", retry_after_s=wait_s)
