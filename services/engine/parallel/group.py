"""What the ranks of a tensor-parallel worker say to each other within a step."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
from torch import distributed
from torch.nn import functional

# No rank waits longer for another within a step: it computes its share of the same one.
COLLECTIVE_TIMEOUT_S = 60.0


class Group(Protocol):
    """Each call is made by all ranks, in the same order, with tensors of the same shape."""

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Over the ranks, the same to the last bit on all of them.  May change ``partial``."""

    def join(self, columns: torch.Tensor, num_columns: int) -> torch.Tensor:
        """The ranks' columns side by side, [rows, num_columns].  Every rank but the last ones, which may have fewer or
        none, brings as many as fill ``num_columns``, rounded up.  The result is the first rank's; others get anything."""


class _Alone:
    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def join(self, columns: torch.Tensor, num_columns: int) -> torch.Tensor:
        return columns


ALONE: Group = _Alone()


class TorchGroup:
    """Over torch.distributed, once in a process, until that ends: gloo on CPU, NCCL on GPUs.  NCCL has never run here."""

    def __init__(self, rank: int, size: int, store: Path, device: torch.device) -> None:
        """Meets the other ranks by ``store``, a file of this group's own that no other user may write.  Blocks until all
        are there.  Raises what torch.distributed raises, after COLLECTIVE_TIMEOUT_S at the latest."""
        self._rank, self._size = rank, size
        # The ranks are of one host, and nobody from another may connect.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
        on_gpu = device.type == "cuda"
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            device_id=device if on_gpu else None,
        )

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        distributed.all_reduce(partial)
        return partial

    def join(self, columns: torch.Tensor, num_columns: int) -> torch.Tensor:
        rows, each = len(columns), -(-num_columns // self._size)
        if not rows:
            return columns.new_empty(0, num_columns)
        padded = functional.pad(columns, (0, each - columns.shape[1])).contiguous()
        gathered = columns.new_empty(self._size, rows, each)
        distributed.all_gather(list(gathered), padded)
        if self._rank:
            return padded
        return gathered.transpose(0, 1).reshape(rows, self._size * each)[:, :num_columns]
