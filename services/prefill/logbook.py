"""When one prompt's chunks were computed and their blocks written, and what of that overlapped.  Pure.

Seconds are of one clock, whichever the caller reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Posting:
    """A batch handed to the transport after the chunk of this number."""

    chunk: int
    num_blocks: int
    posted_s: float


@dataclass(frozen=True, slots=True)
class ChunkTimes:
    """``write_s`` from the first byte to the last of what was written after the chunk; None where that was nothing."""

    compute_s: tuple[float, float]
    num_blocks: int
    write_s: tuple[float, float] | None


class Logbook:
    def __init__(self) -> None:
        self.compute_s = 0.0
        self._computed: list[tuple[float, float]] = []
        self._written: list[tuple[Posting, float, float, int]] = []  # with begin, end, bytes

    @property
    def begun_s(self) -> float | None:
        """When the first chunk's compute began."""
        return self._computed[0][0] if self._computed else None

    @property
    def computed_s(self) -> float:
        """When the last chunk's compute ended."""
        return self._computed[-1][1]

    def computed(self, begun_s: float, elapsed_s: float) -> None:
        self._computed.append((begun_s, begun_s + elapsed_s))
        self.compute_s += elapsed_s

    def posting(self, num_blocks: int, now_s: float) -> Posting:
        """Blocks are about to be posted that the chunk computed last completed, or that were cached before the first."""
        return Posting(max(0, len(self._computed) - 1), num_blocks, now_s)

    def written(self, posting: Posting, queued_s: float, busy_s: float, nbytes: int) -> None:
        begun_s = posting.posted_s + queued_s
        self._written.append((posting, begun_s, begun_s + busy_s, nbytes))

    def num_hidden_bytes(self) -> int:
        """Of the batches that had ended when the last chunk's compute did."""
        return sum(nbytes for _, _, ended_s, nbytes in self._written if ended_s <= self.computed_s)

    def chunks(self, at_most: int) -> list[ChunkTimes]:
        """In order.  Where there are more than ``at_most``, neighbours are joined, equally many everywhere."""
        written: list[list[ChunkTimes]] = [[] for _ in self._computed]
        for posting, begun_s, ended_s, _ in self._written:
            compute_s = self._computed[posting.chunk]
            written[posting.chunk].append(ChunkTimes(compute_s, posting.num_blocks, (begun_s, ended_s)))
        each = [
            _join([ChunkTimes(compute_s, 0, None), *batches])
            for compute_s, batches in zip(self._computed, written, strict=True)
        ]
        size = max(1, -(-len(each) // at_most))
        return [_join(each[start : start + size]) for start in range(0, len(each), size)]


def _join(chunks: Sequence[ChunkTimes]) -> ChunkTimes:
    compute_s = _hull([c.compute_s for c in chunks])
    assert compute_s is not None
    return ChunkTimes(
        compute_s, sum(c.num_blocks for c in chunks), _hull([c.write_s for c in chunks if c.write_s is not None])
    )


def _hull(spans: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    return (min(begin for begin, _ in spans), max(end for _, end in spans)) if spans else None
