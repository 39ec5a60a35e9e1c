"""Who holds which bytes of the memory that conversions write into.  Pure accounting: no memory or clock in here.

Claims are served in the order in which they came, so none starves; a holder asks for no more before it gives back, so
none waits for ever.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from services.engine.layout import KvLayout


@dataclass(slots=True, eq=False)
class Claim:
    """``offset`` is None while it waits for its turn."""

    nbytes: int
    offset: int | None = None


def plan_goes(target: KvLayout, nbytes: int) -> tuple[KvLayout, int]:
    """How blocks for ``target`` lie in ``nbytes`` of scratch memory, and the most tokens to convert at a time.  Blocks are
    those of the target, or smaller where not one of them fits; a go takes up to half of the memory, so that one write
    converts while another is sent.  ValueError when the memory cannot hold one token."""
    if nbytes < target.token_nbytes:
        raise ValueError(f"{nbytes} bytes hold no token of {target.token_nbytes} bytes")
    layout = replace(target, block_size=min(target.block_size, nbytes // target.token_nbytes))
    return layout, layout.block_size * max(1, nbytes // 2 // layout.block_nbytes)


class Scratch:
    """Not thread-safe; one owner calls it."""

    def __init__(self, nbytes: int) -> None:
        if nbytes < 1:
            raise ValueError(f"scratch memory has at least one byte, not {nbytes}")
        self.nbytes = nbytes
        self._held: list[tuple[int, Claim]] = []  # by offset
        self._waiting: deque[Claim] = deque()

    @property
    def num_claims(self) -> int:
        return len(self._held) + len(self._waiting)

    def claim(self, nbytes: int) -> Claim:
        """Has its offset at once where there is room and nobody waits.  ValueError when it could never have one."""
        if not 0 < nbytes <= self.nbytes:
            raise ValueError(f"{nbytes} bytes of {self.nbytes} cannot be claimed")
        claim = Claim(nbytes)
        self._waiting.append(claim)
        self._serve()
        return claim

    def give_back(self, claim: Claim) -> list[Claim]:
        """Ends a claim, held or waiting.  Returns those that got their offsets by it."""
        if claim.offset is None:
            self._waiting.remove(claim)
        else:
            self._held.remove((claim.offset, claim))
        return self._serve()

    def check_integrity(self) -> None:
        """Raises AssertionError when two claims share a byte, one leaves the memory, or the first waits without need."""
        end = 0
        for offset, claim in self._held:
            assert offset == claim.offset, "a claim's offset was changed"
            assert offset >= end, "two claims share a byte"
            end = offset + claim.nbytes
        assert end <= self.nbytes, "a claim leaves the memory"
        assert all(claim.offset is None for claim in self._waiting), "a claim that waits has an offset"
        assert not self._waiting or self._gap(self._waiting[0].nbytes) is None, "a claim waits although there is room"

    def _serve(self) -> list[Claim]:
        served: list[Claim] = []
        while self._waiting and (gap := self._gap(self._waiting[0].nbytes)) is not None:
            index, offset = gap
            claim = self._waiting.popleft()
            claim.offset = offset
            self._held.insert(index, (offset, claim))
            served.append(claim)
        return served

    def _gap(self, nbytes: int) -> tuple[int, int] | None:
        """The first that is large enough: its place among the held, and its offset."""
        end = 0
        for index, (offset, claim) in enumerate(self._held):
            if offset - end >= nbytes:
                return index, end
            end = offset + claim.nbytes
        return (len(self._held), end) if self.nbytes - end >= nbytes else None
