"""What one measurement sends, and when.  Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from kvferry.bench import arrivals, lengths, workload
from kvferry.bench.workload import Ask, Prompt


@dataclass(frozen=True, slots=True)
class Load:
    """Either ``rate`` or a trace's own times, or a closed loop of ``concurrency``.  It asks what the ``trace`` says, else
    ``conversations`` in an order of the seed's and again from the start, else drawn from ``prompt`` and ``output``."""

    rate: float | None
    burstiness: float
    concurrency: int | None
    trace: tuple[Ask, ...]
    speed: float
    conversations: tuple[Ask, ...]
    prompt: lengths.Draw
    output: lengths.Draw
    seed: int
    warmup_s: float
    duration_s: float
    num_requests: int | None
    timeout_s: float

    @property
    def closed(self) -> bool:
        return self.rate is None and not self.trace

    def schedule(
        self, vocab_size: int, context_length: int | None
    ) -> Iterator[tuple[float, Ask, Callable[[], Prompt]]]:
        """When, what, and how to make its prompt.  In a closed loop everything may go at once; the runner's bound and clock
        hold it."""
        prompts = workload.Prompts(vocab_size, self.seed)
        numbered = itertools.islice(zip(self._times(), self._asks(), strict=False), self.num_requests)
        for number, (at_s, asked) in enumerate(numbered):
            if at_s > self.warmup_s + self.duration_s:
                return
            ask = asked if context_length is None else workload.fitted(asked, context_length)
            yield at_s, ask, partial(prompts.make, ask, number)

    def _times(self) -> Iterator[float]:
        if self.rate is not None:
            if self.burstiness == 0:
                return arrivals.constant(self.rate)
            return arrivals.gamma(self.rate, self.burstiness, self.seed)
        if self.trace:
            return arrivals.scaled((ask.at_s for ask in self.trace), self.speed)
        return itertools.repeat(0.0)

    def _asks(self) -> Iterator[Ask]:
        if self.trace:
            return iter(self.trace)
        if self.conversations:
            return workload.shuffled(self.conversations, self.seed)
        return workload.drawn(self.prompt, self.output, self.seed)
