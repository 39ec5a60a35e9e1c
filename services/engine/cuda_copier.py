"""A host tier's memory beside a pool on a GPU: pinned memory, and a stream of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transport.errors import OutOfMemory


class CudaCopier:
    """See ``Copier``.  While its stream is a thread's current one, so is its device.  Never run on a device; tests/gpu has
    what is to hold there."""

    def __init__(self, arena: torch.Tensor, num_slots: int) -> None:
        """``arena``: [num_blocks, ...] on the device.  Blocks while the host's memory is pinned.  Raises OutOfMemory."""
        self._blocks = arena.view(torch.uint8).view(arena.shape[0], -1)
        nbytes = num_slots * self._blocks.shape[1]
        try:
            self._slots = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).view(num_slots, -1)
        except RuntimeError as e:
            raise OutOfMemory(f"{nbytes} bytes of the host's memory cannot be pinned: {e}; ask for fewer") from e
        self._stream = torch.cuda.Stream(arena.device)  # type: ignore[no-untyped-call]

    def down(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        self._copy(self._slots, slots, self._blocks, blocks)

    def up(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        self._copy(self._blocks, blocks, self._slots, slots)

    def _copy(self, to: torch.Tensor, to_rows: Sequence[int], source: torch.Tensor, rows: Sequence[int]) -> None:
        with torch.cuda.stream(self._stream):
            # What steps were asked to compute may still write blocks that are copied down, or read those copied into.
            self._stream.wait_stream(torch.cuda.default_stream(self._blocks.device))
            for to_row, row in zip(to_rows, rows, strict=True):
                to[to_row].copy_(source[row], non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
            event.synchronize()
