"""Ranks as threads of one process: the sums are those of the ranks, in their order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
TIMEOUT_S = 30.0


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.brought: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadGroup:
    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self._rank, self._meeting = rank, meeting
        self.num_sums = 0

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        self.num_sums += 1
        parts = self._exchange(partial.clone())
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def join(self, columns: torch.Tensor, num_columns: int) -> torch.Tensor:
        joined = torch.cat(self._exchange(columns), dim=1)
        assert joined.shape[1] == num_columns
        return joined if self._rank == 0 else torch.full_like(joined, float("nan"))

    def _exchange(self, own: torch.Tensor) -> list[torch.Tensor]:
        self._meeting.brought[self._rank] = own
        self._meeting.barrier.wait()
        brought = list(self._meeting.brought)
        self._meeting.barrier.wait()
        return brought


def on_ranks(size: int, act: Callable[[int, ThreadGroup], T]) -> list[T]:
    """What ``act`` returns on each rank; all run at once."""
    meeting = _Meeting(size)

    def run(rank: int) -> T:
        try:
            return act(rank, ThreadGroup(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))
