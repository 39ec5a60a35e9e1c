"""What this gateway has sent to each worker and not yet heard the end of.  Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.candidates import WorkerKey

# A report is of the worker as it was some time before it came; what ended since was in it.
FLIGHT_S = 0.25
# Workers report every 2 s.  Who is not heard of for longer, as when the directory is away, may have nothing of others' any
# more; who waited for that would wait for ever.
STALE_S = 6.0


@dataclass(slots=True)
class Pending:
    """On one worker: a request's share, or the sum of all."""

    num_requests: int = 0
    prefill_tokens: int = 0
    num_blocks: int = 0  # that it needs and of which the worker may not have reported yet


@dataclass(slots=True)
class _Heard:
    """Of this gateway's, as of a worker's last report."""

    at_s: float
    num_requests: int
    prefill_tokens: int


@dataclass(slots=True)
class _Less:
    """What ended lately, when: (seconds, requests, tokens)."""

    ended: deque[tuple[float, int, int]] = field(default_factory=deque)

    def add(self, now_s: float, num_requests: int, prefill_tokens: int) -> None:
        self.ended.append((now_s, num_requests, prefill_tokens))
        while self.ended[0][0] < now_s - FLIGHT_S:
            self.ended.popleft()

    def since(self, at_s: float) -> tuple[int, int]:
        late = [each for each in self.ended if each[0] >= at_s]
        return sum(each[1] for each in late), sum(each[2] for each in late)


class PendingBook:
    def __init__(self, clock: Callable[[], float], on_less: Callable[[], None] = lambda: None) -> None:
        """``clock``: any monotonic one, in seconds.  ``on_less`` is called when a worker has less to do; it must not
        raise."""
        self._clock = clock
        self._by_worker: dict[WorkerKey, Pending] = {}
        self._begun: dict[WorkerKey, list[Pending]] = {}  # that have their blocks, since the worker's last report
        self._heard: dict[WorkerKey, _Heard] = {}
        self._less: dict[WorkerKey, _Less] = {}
        self._on_less = on_less

    def of(self, key: WorkerKey) -> Pending:
        return self._by_worker.get(key, Pending())

    def there(self, key: WorkerKey, num_requests: int, prefill_tokens: int) -> Pending:
        """What a worker has to do now that last reported so many requests and tokens: what this gateway knows of, and as
        much of others' as there was then, which is what the worker had beyond this gateway's.  So a prompt that was
        computed since is not waited for until the worker reports again."""
        own = self._by_worker.get(key)
        heard = self._heard.get(key)
        if heard is not None:
            is_stale = self._clock() - heard.at_s > STALE_S
            num_requests = 0 if is_stale else max(0, num_requests - heard.num_requests)
            prefill_tokens = 0 if is_stale else max(0, prefill_tokens - heard.prefill_tokens)
        if own is None:
            return Pending(num_requests, prefill_tokens)
        return Pending(own.num_requests + num_requests, own.prefill_tokens + prefill_tokens, own.num_blocks)

    def add(self, key: WorkerKey, prefill_tokens: int, num_blocks: int = 0) -> Pending:
        """One request; what to ``remove`` at its end."""
        total = self._by_worker.setdefault(key, Pending())
        total.num_requests += 1
        total.prefill_tokens += prefill_tokens
        total.num_blocks += num_blocks
        return Pending(1, prefill_tokens, num_blocks)

    def computed(self, key: WorkerKey, counted: Pending) -> None:
        """The prompt is no longer ahead of others', and has its blocks, which count until the worker reports; the request
        goes on.  Before its removal; idempotent."""
        self._ended(key, 0, counted.prefill_tokens)
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
        now_s, own = self._clock(), self.of(key)
        less = self._less[key].since(now_s - FLIGHT_S) if key in self._less else (0, 0)
        self._heard[key] = _Heard(now_s, own.num_requests + less[0], own.prefill_tokens + less[1])

    def gone(self, key: WorkerKey) -> None:
        """The worker will report no more; what was sent there is still to be removed."""
        self._heard.pop(key, None)
        self._less.pop(key, None)

    def remove(self, key: WorkerKey, ended: Pending) -> None:
        self._ended(key, ended.num_requests, ended.prefill_tokens)
        total = self._by_worker[key]
        total.num_requests -= ended.num_requests
        total.prefill_tokens -= ended.prefill_tokens
        total.num_blocks -= ended.num_blocks
        if ended.num_blocks and (begun := self._begun.get(key)):
            self._begun[key] = [each for each in begun if each is not ended]
        if total.num_requests == 0:
            del self._by_worker[key]
        self._on_less()

    def _ended(self, key: WorkerKey, num_requests: int, prefill_tokens: int) -> None:
        if key in self._heard:  # a worker that is there
            self._less.setdefault(key, _Less()).add(self._clock(), num_requests, prefill_tokens)
