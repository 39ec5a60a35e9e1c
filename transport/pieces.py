"""What a batch asks for, checked before a byte moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from transport.errors import OutOfBounds

U64 = npt.NDArray[np.uint64]
Offsets = Sequence[int] | npt.NDArray[np.integer]


def check_pieces(
    local_offsets: Offsets, remote_offsets: Offsets, sizes: Offsets | int, *, local_nbytes: int, remote_nbytes: int
) -> tuple[U64, U64, U64]:
    """The three as contiguous arrays of one length; ``sizes`` may be one number for all pieces.  Raises ValueError for
    unequal lengths, TypeError for anything but integers, OutOfBounds for a piece that leaves either region."""
    local, remote = _numbers("local_offsets", local_offsets), _numbers("remote_offsets", remote_offsets)
    size = _numbers("sizes", np.full(len(local), sizes) if np.ndim(sizes) == 0 else sizes)
    if not len(local) == len(remote) == len(size):
        raise ValueError(
            f"{len(local)} local offsets, {len(remote)} remote offsets and {len(size)} sizes do not pair up"
        )
    for name, offsets, nbytes in (("local", local, local_nbytes), ("remote", remote, remote_nbytes)):
        room = np.uint64(nbytes)
        outside = (size > room) | (offsets > room - np.minimum(size, room))
        if outside.any():
            i = int(outside.argmax())
            raise OutOfBounds(f"piece {i}: {size[i]} bytes at {name} offset {offsets[i]} leave the region of {nbytes}")
    return local, remote, size


def merge(local: U64, remote: U64, size: U64) -> list[tuple[int, int, int]]:
    """(local offset, remote offset, bytes) with empty pieces left out and neighbours on both sides made one."""
    merged: list[tuple[int, int, int]] = []
    for here, there, nbytes in zip(local.tolist(), remote.tolist(), size.tolist(), strict=True):
        if nbytes == 0:
            continue
        if merged:
            h, t, n = merged[-1]
            if h + n == here and t + n == there:
                merged[-1] = (h, t, n + nbytes)
                continue
        merged.append((here, there, nbytes))
    return merged


def _numbers(name: str, values: Offsets | int) -> U64:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} has {array.ndim} dimensions, not one")
    if len(array) == 0:
        return np.empty(0, np.uint64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} holds {array.dtype}, not integers below 2**64")
    if array.dtype.kind == "i" and array.min() < 0:
        raise OutOfBounds(f"{name} holds {array.min()}")
    return np.ascontiguousarray(array, np.uint64)
