"""A load that turns: long prompts with short answers, then short prompts with long answers.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from zlib import crc32

from kvferry.bench import arrivals
from kvferry.bench.record import Record
from kvferry.bench.workload import Ask, Prompt, Prompts


@dataclass(frozen=True, slots=True)
class Half:
    """Requests of one shape, Poisson at ``rate`` a second."""

    name: str
    rate: float
    ask: Ask


@dataclass(frozen=True, slots=True)
class Turn:
    """``half_s``: how long each of the halves is."""

    prompts: Half
    answers: Half
    half_s: float

    @property
    def halves(self) -> tuple[Half, Half]:
        return self.prompts, self.answers

    def schedule(self, vocab_size: int, seed: int) -> Iterator[tuple[float, Ask, Callable[[], Prompt]]]:
        """The same of a seed, whoever serves it."""
        number = 0
        for index, half in enumerate(self.halves):
            prompts = Prompts(vocab_size, crc32(f"{seed} {half}".encode()))
            for at_s in arrivals.gamma(half.rate, 1.0, seed + index):
                if at_s >= self.half_s:
                    break
                yield index * self.half_s + at_s, half.ask, partial(prompts.make, half.ask, number)
                number += 1

    def of(self, half: Half, records: tuple[Record, ...]) -> list[Record]:
        """Those that were due in ``half``."""
        begin_s = self.halves.index(half) * self.half_s
        return [record for record in records if begin_s <= record.scheduled_s < begin_s + self.half_s]
