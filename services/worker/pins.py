"""Leases by which other workers read cached blocks of this pool.  Pure: times come in.

A pin holds one reference on each of its blocks, so none of them is evicted or handed out, until its reader releases it,
its lease ends, or a newer process of the reader speaks, whichever is first.  Reads are one-sided and change nothing, so
the end of a pin waits for nobody: a reader must find out whether its pin stood until its read had ended, and ``release``
tells it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.engine.blocks import BlockPool

# Pins may hold one block in so many: the others are enough to serve.
PINNED_SHARE = 4
MAX_PINS = 1024


class PinRefusedError(Exception):
    """The message is from a process that may not send it; nothing was changed."""


class TooManyPinsError(Exception):
    """Pins are at their bound; nothing was pinned.  There is room again when others are released or end."""


@dataclass(frozen=True, slots=True)
class ReaderId:
    """A later process of a worker has a greater incarnation."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Pin:
    id: str
    reader: ReaderId
    blocks: tuple[int, ...]
    expires_s: float


class PinBook:
    """The pins of one pool, which it shares with a scheduler: calls come from one place at a time (the engine's exclusive
    section).  ``max_blocks`` is what the scheduler can do without; a block in several pins counts once."""

    def __init__(self, pool: BlockPool, *, max_blocks: int, max_pins: int) -> None:
        self._pool = pool
        self._max_blocks = max_blocks
        self._max_pins = max_pins
        self._pins: dict[str, Pin] = {}
        self._references: dict[int, int] = {}  # pins on each block

    @property
    def num_pins(self) -> int:
        return len(self._pins)

    @property
    def num_blocks(self) -> int:
        """Blocks in at least one pin."""
        return len(self._references)

    @property
    def num_pinnable(self) -> int:
        """Blocks that a pin could get now."""
        return self._max_blocks - self.num_blocks if self.num_pins < self._max_pins else 0

    def pin(
        self, pin_id: str, hashes: Sequence[bytes], reader: ReaderId, *, now_s: float, lifetime_s: float
    ) -> Pin | None:
        """Pins the longest prefix of the chain held here, but no more than ``max_blocks`` of it; None when not even its
        first block is held.  Raises TooManyPinsError, or PinRefusedError when a newer process of this reader has pins."""
        assert pin_id not in self._pins
        self.expire(now_s)
        self._end_predecessors(reader)
        blocks = self._pool.match(hashes[: self._max_blocks])
        if not blocks:
            return None
        if len(self._pins) >= self._max_pins:
            raise TooManyPinsError(f"{len(self._pins)} pins stand already, as many as may; release some or ask later")
        fresh = sum(block not in self._references for block in blocks)
        if self.num_blocks + fresh > self._max_blocks:
            raise TooManyPinsError(
                f"{fresh} more blocks asked for, {self.num_blocks} of the {self._max_blocks} that may be pinned are; "
                f"ask for fewer or ask later"
            )
        self._pool.acquire(blocks)
        for block in blocks:
            self._references[block] = self._references.get(block, 0) + 1
        pin = self._pins[pin_id] = Pin(pin_id, reader, tuple(blocks), now_s + lifetime_s)
        return pin

    def release(self, pin_id: str, reader: ReaderId, *, now_s: float) -> bool:
        """Ends the pin.  True when it stood until now: what was read under it is good.  False when it had ended before or
        never was; nothing changes then.  Raises PinRefusedError when it is another reader's."""
        self.expire(now_s)
        pin = self._pins.get(pin_id)
        if pin is None:
            return False
        if pin.reader != reader:
            raise PinRefusedError(
                f"pin {pin_id} is {pin.reader.worker_id}/{pin.reader.incarnation}'s, "
                f"not {reader.worker_id}/{reader.incarnation}'s"
            )
        self._end(pin)
        return True

    def expire(self, now_s: float) -> list[Pin]:
        """Ends the pins whose time is over, and returns them."""
        late = [pin for pin in self._pins.values() if now_s >= pin.expires_s]
        for pin in late:
            self._end(pin)
        return late

    def next_expiry_s(self) -> float | None:
        return min((pin.expires_s for pin in self._pins.values()), default=None)

    def references(self) -> dict[int, int]:
        """How many of the pool's references on each block are pins'."""
        return dict(self._references)

    def check_integrity(self) -> None:
        """Raises AssertionError unless pins stay in their bounds and the pool holds a reference for each."""
        counted: dict[int, int] = {}
        for pin in self._pins.values():
            for block in pin.blocks:
                counted[block] = counted.get(block, 0) + 1
        assert counted == self._references, "the references counted are not those of the pins"
        held = self._pool.references()
        for block, count in counted.items():
            assert held.get(block, 0) >= count, f"block {block}: {count} pins, {held.get(block, 0)} references"
        assert self.num_blocks <= self._max_blocks, f"{self.num_blocks} blocks are pinned, {self._max_blocks} may be"
        assert self.num_pins <= self._max_pins, f"{self.num_pins} pins stand, {self._max_pins} may"

    def _end_predecessors(self, reader: ReaderId) -> None:
        """A newer process of the same worker speaks: the older one has been replaced."""
        others = [p for p in self._pins.values() if p.reader.worker_id == reader.worker_id and p.reader != reader]
        if any(p.reader.incarnation > reader.incarnation for p in others):
            raise PinRefusedError(
                f"reader {reader.worker_id}/{reader.incarnation} was replaced by a newer process, which has pins here"
            )
        for pin in others:
            self._end(pin)

    def _end(self, pin: Pin) -> None:
        del self._pins[pin.id]
        self._pool.release(pin.blocks)
        for block in pin.blocks:
            self._references[block] -= 1
            if not self._references[block]:
                del self._references[block]
