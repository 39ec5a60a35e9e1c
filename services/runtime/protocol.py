"""Which versions of the contract between gateways and workers, and among workers, a process speaks.

A version counts up when a message of ``kvferry.api.worker.v1`` changes so that one who does not know of it would do the
wrong thing.  What may be passed over needs no new version.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Protocol:
    """All versions from the oldest to the newest."""

    oldest: int
    newest: int

    @classmethod
    def said(cls, oldest: int, newest: int) -> Protocol:
        """What a worker registered.  0 was not said: neither is the first version alone, only the oldest is the newest
        alone."""
        newest = newest or 1
        return cls(oldest or newest, newest)

    def overlaps(self, other: Protocol) -> bool:
        """Whether there is a version that both speak."""
        return max(self.oldest, other.oldest) <= min(self.newest, other.newest)

    def __str__(self) -> str:
        return f"{self.newest}" if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


FIRST = Protocol(1, 1)
# By this process.  Raise the newest with the change that needs it, the oldest when nothing here says it any more.
SPOKEN = Protocol(oldest=1, newest=1)
