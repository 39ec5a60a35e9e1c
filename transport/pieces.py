"""What a batch asks for, in the form that compiled code reads."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from transport.errors import OutOfBounds

U64 = npt.NDArray[np.uint64]
Offsets = Sequence[int] | npt.NDArray[np.integer]

_INTEGERS = (int, np.integer)
_WANTED = np.dtype(np.uint64)


class Pieces(NamedTuple):
    """``packed`` holds three columns of unsigned 64-bit numbers, one after the other: ``num_blocks`` local and as many
    remote offsets, then ``num_sizes`` sizes, which is one where one size holds for all."""

    packed: bytes
    num_blocks: int
    num_sizes: int

    @classmethod
    def of(cls, local_offsets: Offsets, remote_offsets: Offsets, sizes: Offsets | int) -> Pieces:
        """Raises ValueError for unequal lengths, TypeError for anything but integers, OutOfBounds for negative ones."""
        local, remote = _packed("local_offsets", local_offsets), _packed("remote_offsets", remote_offsets)
        one_size = isinstance(sizes, _INTEGERS)
        size = _packed("sizes", (sizes,) if one_size else sizes)  # type: ignore[arg-type]
        if not len(local) == len(remote) or not (one_size or len(local) == len(size)):
            raise ValueError(
                f"{len(local) // 8} local offsets, {len(remote) // 8} remote offsets and {len(size) // 8} sizes do not "
                "pair up"
            )
        return cls(local + remote + size, len(local) // 8, len(size) // 8)

    def out_of_bounds(self, local_nbytes: int, remote_nbytes: int) -> OutOfBounds | None:
        """Names the first piece that leaves a region, if any does."""
        local, remote, size = self._columns()
        for name, offsets, nbytes in (("local", local, local_nbytes), ("remote", remote, remote_nbytes)):
            room = np.uint64(nbytes)
            outside = (size > room) | (offsets > room - np.minimum(size, room))
            if outside.any():
                i = int(outside.argmax())
                what = f"piece {i}: {size[i]} bytes at {name} offset {offsets[i]}"
                return OutOfBounds(f"{what} leave the region of {nbytes}")
        return None

    def merged(self) -> Iterator[tuple[int, int, int]]:
        """(local offset, remote offset, bytes) with empty pieces left out and neighbours on both sides made one."""
        last: tuple[int, int, int] | None = None
        for here, there, nbytes in zip(*(column.tolist() for column in self._columns()), strict=True):
            if nbytes == 0:
                continue
            if last and last[0] + last[2] == here and last[1] + last[2] == there:
                last = (last[0], last[1], last[2] + nbytes)
                continue
            if last:
                yield last
            last = (here, there, nbytes)
        if last:
            yield last

    def _columns(self) -> tuple[U64, U64, U64]:
        n = self.num_blocks
        numbers = np.frombuffer(self.packed, np.uint64)
        return numbers[:n], numbers[n : 2 * n], np.broadcast_to(numbers[2 * n :], n) if n else numbers[:0]


def _packed(name: str, values: Offsets) -> bytes:
    if isinstance(values, np.ndarray):
        return _checked(name, values).tobytes()
    try:
        return array("Q", values).tobytes()
    except TypeError as e:
        raise TypeError(f"{name}: {e}; offsets and sizes are integers") from e
    except OverflowError as e:
        raise OutOfBounds(f"{name} holds a number below 0 or above 2**64 - 1") from e


def _checked(name: str, values: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    if values.ndim != 1:
        raise ValueError(f"{name} has {values.ndim} dimensions, not one")
    if values.dtype == _WANTED:
        return values
    if values.dtype.kind not in "iu" and len(values):
        raise TypeError(f"{name} holds {values.dtype}, not integers below 2**64")
    if values.dtype.kind == "i" and len(values) and values.min() < 0:
        raise OutOfBounds(f"{name} holds {values.min()}")
    return values.astype(np.uint64)
