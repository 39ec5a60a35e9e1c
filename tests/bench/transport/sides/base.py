"""What one process of a measured pair can do, whichever library moves the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tests.bench.transport.pattern import U8


@dataclass(frozen=True, slots=True)
class Stamps:
    """Of one batch, on time.monotonic_ns's clock, which all processes of a host share."""

    began_ns: int
    posted_ns: int  # the library took it
    ended_ns: int  # every byte is in place

    @property
    def seconds(self) -> float:
        return (self.ended_ns - self.began_ns) / 1e9


class Side(Protocol):
    """A pool of blocks, and one-sided batches against the peer's.  What must be ready before a batch can be posted is
    made outside the stamps."""

    def pool(self, role: str) -> U8:
        """[blocks, bytes] of the "target" or the "initiator"; a side holds its own, memcpy holds both."""
        ...

    def describe(self) -> str:
        """What the peer needs to reach the pool."""
        ...

    def connect(self, description: str) -> str:
        """Returns what the peer must be told in its turn, or nothing."""
        ...

    def run(self, op: str, local: Sequence[int], remote: Sequence[int]) -> Stamps:
        """Moves the initiator's blocks ``local`` to the target's ``remote`` ("write"), or back ("read")."""
        ...
