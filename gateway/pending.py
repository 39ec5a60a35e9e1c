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
    num_blocks: int = 0  # that it needs and of which the worker may not have reported yet


class PendingBook:
    def __init__(self, on_less: Callable[[], None] = lambda: None) -> None:
        """``on_less`` is called when a worker has less to do; it must not raise."""
        self._by_worker: dict[WorkerKey, Pending] = {}
        self._at_report: dict[WorkerKey, tuple[int, int]] = {}  # requests and tokens, where there were any
        self._begun: dict[WorkerKey, list[Pending]] = {}  # that have their blocks, since the worker's last report
        self._on_less = on_less

    def of(self, key: WorkerKey) -> Pending:
        return self._by_worker.get(key, Pending())

    def there(self, key: WorkerKey, num_requests: int, prefill_tokens: int) -> Pending:
        """What a worker has to do now that last reported so many requests and tokens: what this gateway knows of, and as
        much of others' as there was then, which is what the worker had beyond this gateway's.  So a prompt that was
        computed since is not waited for until the worker reports again."""
        own = self._by_worker.get(key)
        requests_then, tokens_then = self._at_report.get(key, (0, 0))
        others = max(0, num_requests - requests_then), max(0, prefill_tokens - tokens_then)
        if own is None:
            return Pending(*others)
        return Pending(own.num_requests + others[0], own.prefill_tokens + others[1], own.num_blocks)

    def add(self, key: WorkerKey, prefill_tokens: int, num_blocks: int = 0) -> Pending:
        """One request; what to ``remove`` at its end."""
        total = self._by_worker.setdefault(key, Pending())
        total.num_requests += 1
        total.prefill_tokens += prefill_tokens
        total.num_blocks += num_blocks
        return Pending(1, prefill_tokens, num_blocks)

    def computed(self, key: WorkerKey, counted: Pending) -> None:
        """The prompt is no longer ahead of others', and has its blocks, which count until the worker reports; the request
        goes on.  Once, before its removal."""
        self._by_worker[key].prefill_tokens -= counted.prefill_tokens
        counted.prefill_tokens = 0
        if counted.num_blocks:
            self._begun.setdefault(key, []).append(counted)
        self._on_less()

    def reported(self, key: WorkerKey) -> None:
        """The worker has told what it has: what had begun there is a part of that."""
        for begun in self._begun.pop(key, ()):
            self._by_worker[key].num_blocks -= begun.num_blocks
            begun.num_blocks = 0
        if own := self._by_worker.get(key):
            self._at_report[key] = own.num_requests, own.prefill_tokens
        else:
            self._at_report.pop(key, None)

    def gone(self, key: WorkerKey) -> None:
        """The worker will report no more; what was sent there is still to be removed."""
        self._at_report.pop(key, None)

    def remove(self, key: WorkerKey, ended: Pending) -> None:
        total = self._by_worker[key]
        total.num_requests -= ended.num_requests
        total.prefill_tokens -= ended.prefill_tokens
        total.num_blocks -= ended.num_blocks
        if ended.num_blocks and (begun := self._begun.get(key)):
            self._begun[key] = [each for each in begun if each is not ended]
        if total.num_requests == 0:
            del self._by_worker[key]
        self._on_less()
