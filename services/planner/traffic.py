"""Requests as a fleet simulator takes them: arrays, from a trace's.  Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from kvferry.bench.workload import HASHED_TOKENS, Ask
from kvferry.errors import InvalidRequestError

SHUFFLED_S = 60.0

Seconds = NDArray[np.float64]
Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Traffic:
    """By request, in order of arrival from 0 s on.  ``num_cached`` of the prompt need not be computed; it is less than
    ``num_input``, for the last token is always computed."""

    arrive_s: Seconds
    num_input: Tokens
    num_output: Tokens
    num_cached: Tokens

    def __len__(self) -> int:
        return len(self.arrive_s)

    @property
    def duration_s(self) -> float:
        """As if the last request took as long to come as the others on average."""
        last_s = float(self.arrive_s[-1])
        return last_s * len(self) / (len(self) - 1) if len(self) > 1 and last_s > 0 else 1.0

    @property
    def rate(self) -> float:
        return len(self) / self.duration_s

    @property
    def num_tokens(self) -> float:
        """Prompts and answers."""
        return float(self.num_input.sum(dtype=np.int64) + self.num_output.sum(dtype=np.int64))

    @property
    def hit_rate(self) -> float:
        return float(self.num_cached.sum(dtype=np.int64) / self.num_input.sum(dtype=np.int64))

    def with_longer_prompts(self, factor: int) -> Traffic:
        return replace(self, num_input=self.num_input * factor, num_cached=self.num_cached * factor)

    def with_more_hits(self, share: float) -> Traffic:
        """``share`` of what was not cached is."""
        more = ((self.num_input - self.num_cached) * share).astype(np.int32)
        return replace(self, num_cached=np.minimum(self.num_cached + more, self.num_input - 1))

    def shuffled(self, seed: int) -> Traffic:
        """Other requests at the same times: within each minute they change places.  Load and its bursts stay, who meets
        whom does not.  Seed 0 changes nothing."""
        if seed == 0:
            return self
        random = np.random.default_rng(seed)
        order = np.lexsort((random.random(len(self)), np.floor(self.arrive_s / SHUFFLED_S)))
        return Traffic(self.arrive_s, self.num_input[order], self.num_output[order], self.num_cached[order])

    def poisson(self, rate: float, seed: int, count: int) -> Traffic:
        """``count`` requests, ``rate`` a second, in the trace's order from a random one on, and from another one again
        where there are fewer."""
        if not 0 < rate < float("inf"):
            raise InvalidRequestError(f"a rate must be above 0, not {rate}")
        random = np.random.default_rng(seed)
        gaps = random.exponential(1 / rate, count)
        first = random.integers(len(self), size=ceil(count / len(self)))
        which = ((first[:, None] + np.arange(len(self))) % len(self)).ravel()[:count]
        return Traffic(
            np.cumsum(gaps) - gaps[0], *(each[which] for each in (self.num_input, self.num_output, self.num_cached))
        )

    def faster(self, speed: float) -> Traffic:
        if not 0 < speed < float("inf"):
            raise InvalidRequestError(f"a speed must be above 0, not {speed}")
        return replace(self, arrive_s=self.arrive_s / speed)

    def busiest(self, count: int) -> Traffic:
        """Of all stretches of ``count`` requests the one with most tokens a second; all, where there are no more."""
        if len(self) <= count:
            return self
        tokens = np.concatenate([[0.0], np.cumsum(self.num_input + self.num_output, dtype=np.float64)])
        spans_s = np.maximum(self.arrive_s[count - 1 :] - self.arrive_s[: len(self) - count + 1], 1e-9)
        first = int(np.argmax((tokens[count:] - tokens[:-count]) / spans_s))
        kept = slice(first, first + count)
        return Traffic(
            self.arrive_s[kept] - self.arrive_s[first],
            self.num_input[kept],
            self.num_output[kept],
            self.num_cached[kept],
        )

    def in_turn(self, num_cells: int) -> Traffic:
        """As if each of ``num_cells`` equal fleets, to which requests go in turn, had its share of them after the one
        before it had: all requests, at a fleet's rate."""
        at_s = self.arrive_s + np.arange(len(self)) % num_cells * self.duration_s
        order = np.argsort(at_s, kind="stable")
        return Traffic(at_s[order], self.num_input[order], self.num_output[order], self.num_cached[order])


def traffic_of(asks: Sequence[Ask], cache_tokens: float) -> Traffic:
    """``asks`` in order of time.  What is cached is what a cluster found to be, where one was asked, and else what a cache
    of ``cache_tokens`` that all workers share, and that forgets what was used longest ago, would hold of blocks with equal
    hash ids before it."""
    held = _cached(asks, int(cache_tokens // HASHED_TOKENS))
    cached = [ask.num_cached_tokens or count for ask, count in zip(asks, held, strict=True)]
    first_s = asks[0].at_s
    return Traffic(
        np.array([ask.at_s - first_s for ask in asks], np.float64),
        np.array([ask.num_prompt_tokens for ask in asks], np.int32),
        np.array([ask.num_output_tokens for ask in asks], np.int32),
        np.array([min(c, ask.num_prompt_tokens - 1) for c, ask in zip(cached, asks, strict=True)], np.int32),
    )


def _cached(asks: Sequence[Ask], num_blocks: int) -> list[int]:
    held: OrderedDict[int, None] = OrderedDict()
    found = []
    for ask in asks:
        count = next((i for i, h in enumerate(ask.hash_ids) if h not in held), len(ask.hash_ids))
        found.append(count * HASHED_TOKENS)
        # The last first: a block is of no use without those before it, so it is forgotten before them.
        for block in reversed(ask.hash_ids):
            held[block] = None
            held.move_to_end(block)
        while len(held) > num_blocks:
            held.popitem(last=False)
    return found
