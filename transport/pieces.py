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

FEW = 64  # up to so many numbers, numpy's way to an address costs more than another copy


class Numbers(NamedTuple):
    """Unsigned 64-bit numbers at ``address``, for as long as ``owner`` lives."""

    address: int
    length: int
    owner: array[int] | U64

    def as_numpy(self) -> U64:
        return np.asarray(self.owner, np.uint64)


class Pieces(NamedTuple):
    """Three columns; ``sizes`` has one entry where one size holds for all."""

    local: Numbers
    remote: Numbers
    sizes: Numbers

    @classmethod
    def of(cls, local_offsets: Offsets, remote_offsets: Offsets, sizes: Offsets | int) -> Pieces:
        """Raises ValueError for unequal lengths, TypeError for anything but integers, OutOfBounds for negative ones."""
        local, remote = _numbers("local_offsets", local_offsets), _numbers("remote_offsets", remote_offsets)
        if isinstance(sizes, int | np.integer):
            size, num_sizes = _numbers("sizes", (int(sizes),)), local.length
        else:
            size = _numbers("sizes", sizes)
            num_sizes = size.length
        if not local.length == remote.length == num_sizes:
            raise ValueError(
                f"{local.length} local offsets, {remote.length} remote offsets and {num_sizes} sizes do not pair up"
            )
        return cls(local, remote, size)

    @property
    def num_blocks(self) -> int:
        return self.local.length

    def out_of_bounds(self, local_nbytes: int, remote_nbytes: int) -> OutOfBounds | None:
        """Names the first piece that leaves a region, if any does."""
        size = self._sizes()
        for name, numbers, nbytes in (("local", self.local, local_nbytes), ("remote", self.remote, remote_nbytes)):
            room, offsets = np.uint64(nbytes), numbers.as_numpy()
            outside = (size > room) | (offsets > room - np.minimum(size, room))
            if outside.any():
                i = int(outside.argmax())
                what = f"piece {i}: {size[i]} bytes at {name} offset {offsets[i]}"
                return OutOfBounds(f"{what} leave the region of {nbytes}")
        return None

    def merged(self) -> Iterator[tuple[int, int, int]]:
        """(local offset, remote offset, bytes) with empty pieces left out and neighbours on both sides made one."""
        last: tuple[int, int, int] | None = None
        rows = (self.local.as_numpy().tolist(), self.remote.as_numpy().tolist(), self._sizes().tolist())
        for here, there, nbytes in zip(*rows, strict=True):
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

    def _sizes(self) -> U64:
        size = self.sizes.as_numpy()
        return np.broadcast_to(size, self.num_blocks) if self.num_blocks else size[:0]


def _numbers(name: str, values: Offsets) -> Numbers:
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise ValueError(f"{name} has {values.ndim} dimensions, not one")
        if values.dtype.kind not in "iu" and len(values):
            raise TypeError(f"{name} holds {values.dtype}, not integers below 2**64")
        if len(values) > FEW:
            if values.dtype.kind == "i" and values.min() < 0:
                raise OutOfBounds(f"{name} holds {values.min()}")
            copy = np.ascontiguousarray(values, np.uint64)
            return Numbers(copy.ctypes.data, len(copy), copy)
        values = values.tolist()
    try:
        own = array("Q", values)
    except TypeError as e:
        raise TypeError(f"{name}: {e}; offsets and sizes are integers") from e
    except OverflowError as e:
        raise OutOfBounds(f"{name} holds a number below 0 or above 2**64 - 1") from e
    return Numbers(*own.buffer_info(), own)
