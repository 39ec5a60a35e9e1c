"""Where a worker keeps a KV block."""

from __future__ import annotations

from enum import Enum


class Tier(Enum):
    """Numbered as kvferry.api.directory.v1.Tier."""

    DEVICE = 1
    """The memory that attention reads."""
    HOST = 2
    """The host's, from which a copy brings it back."""

    @classmethod
    def of(cls, number: int) -> Tier | None:
        """The device where a message says nothing; None for a tier that is not known here."""
        return _BY_NUMBER.get(number)


_BY_NUMBER = {0: Tier.DEVICE} | {tier.value: tier for tier in Tier}
