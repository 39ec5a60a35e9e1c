"""Which of several gateways a client asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from kvferry import errors

_G = TypeVar("_G")

# gRPC's own lists of addresses: one channel for all of them.
_LISTS = ("ipv4:", "ipv6:")


class Gateways(Generic[_G]):
    """One is asked until it fails or refuses, then the next, in a circle.  May be used by several threads."""

    def __init__(self, address: str, connect: Callable[[str], _G]) -> None:
        """``address``: a gRPC target, or several with commas between them."""
        targets = [address] if address.startswith(_LISTS) else [part.strip() for part in address.split(",")]
        if not all(targets):
            raise errors.InvalidRequestError(
                f"address {address!r}: give host:port, or several with a comma between them"
            )
        self.all = tuple(connect(target) for target in targets)
        self._current = 0

    @property
    def current(self) -> _G:
        return self.all[self._current]

    def leave(self, gateway: _G) -> None:
        """It did not serve a call.  Nothing happens when the next one is being asked already."""
        index = self._current
        if self.all[index] is gateway:
            self._current = (index + 1) % len(self.all)
