"""What this gateway has sent to each worker and not yet heard the end of.  Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.candidates import WorkerKey


@dataclass(slots=True)
class Pending:
    """On one worker: a request's share, or the sum of all."""

    num_requests: int = 0
    prefill_tokens: int = 0
    num_blocks: int = 0  # that it needs and, before its first token, may not have been given yet


class PendingBook:
    def __init__(self, on_less: Callable[[], None] = lambda: None) -> None:
        """``on_less`` is called when a worker has less to do; it must not raise."""
        self._by_worker: dict[WorkerKey, Pending] = {}
        self._on_less = on_less

    def of(self, key: WorkerKey) -> Pending:
        return self._by_worker.get(key, Pending())

    def add(self, key: WorkerKey, prefill_tokens: int, num_blocks: int = 0) -> Pending:
        """One request; what to ``remove`` at its end."""
        total = self._by_worker.setdefault(key, Pending())
        total.num_requests += 1
        total.prefill_tokens += prefill_tokens
        total.num_blocks += num_blocks
        return Pending(1, prefill_tokens, num_blocks)

    def computed(self, key: WorkerKey, counted: Pending) -> None:
        """The prompt is no longer ahead of others', and has its blocks; the request goes on.  Idempotent."""
        if not counted.prefill_tokens and not counted.num_blocks:
            return
        total = self._by_worker[key]
        total.prefill_tokens -= counted.prefill_tokens
        total.num_blocks -= counted.num_blocks
        counted.prefill_tokens = counted.num_blocks = 0
        self._on_less()

    def remove(self, key: WorkerKey, ended: Pending) -> None:
        total = self._by_worker[key]
        total.num_requests -= ended.num_requests
        total.prefill_tokens -= ended.prefill_tokens
        total.num_blocks -= ended.num_blocks
        if total.num_requests == 0:
            del self._by_worker[key]
        self._on_less()
