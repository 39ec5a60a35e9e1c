"""The mixed load: streams of short prompts, among which long prompts arrive.  Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from zlib import crc32

from kvferry.bench import arrivals
from kvferry.bench.record import Record
from kvferry.bench.workload import Ask, Prompt, Prompts

STREAM = Ask(0.0, num_prompt_tokens=48, num_output_tokens=96)
LONG = Ask(0.0, num_prompt_tokens=768, num_output_tokens=16)


@dataclass(frozen=True, slots=True)
class Mix:
    """Requests/s of each kind, both Poisson; ``long_rate`` 0 is the quiet load."""

    stream_rate: float
    long_rate: float

    def scaled(self, factor: float) -> Mix:
        return Mix(self.stream_rate * factor, self.long_rate * factor)

    def quiet(self) -> Mix:
        return Mix(self.stream_rate, 0.0)

    def schedule(self, seconds: float, vocab_size: int, seed: int) -> Iterator[tuple[float, Ask, Callable[[], Prompt]]]:
        """The streams come at the same times whether long prompts come too or not."""
        # Of this load's own: what another left in the caches is not found again.
        prompts = Prompts(vocab_size, crc32(f"{seed} {self}".encode()))
        kinds = [((at, STREAM) for at in arrivals.gamma(self.stream_rate, 1.0, seed))]
        if self.long_rate > 0:
            kinds.append((at, LONG) for at in arrivals.gamma(self.long_rate, 1.0, seed + 1))
        for number, (at_s, ask) in enumerate(heapq.merge(*kinds, key=lambda pair: pair[0])):
            if at_s > seconds:
                return
            yield at_s, ask, partial(prompts.make, ask, number)


def is_stream(record: Record) -> bool:
    return record.num_prompt_tokens == STREAM.num_prompt_tokens
