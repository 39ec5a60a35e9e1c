"""What both the real fleet and the simulated one are asked.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile

from kvferry.bench import arrivals, lengths, workload
from kvferry.bench.workload import Ask, Prompt, Prompts

PROMPT, ANSWER = lengths.parse("lognormal:256:0.5"), lengths.parse("lognormal:32:0.5")
MOST_TOKENS = 1024  # prompt and answer, as calibration goes no further

Due = tuple[float, Ask]


def load(rate: float, seconds: float, seed: int) -> list[Due]:
    """Poisson arrivals.  The same lengths in the same order at every rate."""
    times = takewhile(lambda at_s: at_s <= seconds, arrivals.gamma(rate, 1.0, seed))
    asks = (workload.fitted(ask, MOST_TOKENS) for ask in workload.drawn(PROMPT, ANSWER, seed))
    return list(zip(times, asks, strict=False))


def schedule(dues: Sequence[Due], vocab_size: int, seed: int) -> Iterator[tuple[float, Ask, Callable[[], Prompt]]]:
    """Prompts of ``seed``'s own: what another load left in the caches is not found again."""
    prompts = Prompts(vocab_size, seed)
    for number, (at_s, ask) in enumerate(dues):
        yield at_s, ask, partial(prompts.make, ask, number)
