"""Drawing tokens.  A draw depends on the logits, the sampling parameters, the seed and the position, and on nothing else:
whichever worker continues a request draws what any other would have drawn.  No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.engine.sampling_params import DrawFailed, Drawn, Sample, Sampling

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_FIRST_LOOK = 256


def draw(logits: F32, samples: Sequence[Sample]) -> list[Drawn | DrawFailed | None]:
    """One token per row of ``logits`` [n, vocab], for n samples.  Each row is treated alone, in float64, so its company in
    a batch changes nothing.  DrawFailed for a row that holds NaN or infinity; None, without looking at it, for one behind
    a draft that is not what was drawn."""
    drawn: list[Drawn | DrawFailed | None] = []
    refused = False
    for row, sample in zip(logits, samples, strict=True):
        token = None if refused else _draw(row, sample.sampling, sample.position)
        drawn.append(token)
        accepted = isinstance(token, Drawn) and token.token_id == sample.draft
        refused = sample.draft is not None and not accepted
    return drawn


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the token at ``position``: counter-based, so no state travels with a request."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _draw(row: F32, sampling: Sampling, position: int) -> Drawn | DrawFailed:
    best = int(row.argmax())  # the lowest id among equals
    if not np.isfinite(row[best]):
        return DrawFailed(f"the model's logits for position {position} are not finite")
    token_id = best if sampling.temperature == 0 else _sample(row, float(row[best]), sampling, position)
    if sampling.num_logprobs is None:
        return Drawn(token_id)
    wide = row.astype(np.float64) - float(row[best])
    logprobs = wide - np.log(np.exp(wide).sum())
    top = tuple((int(i), float(logprobs[i])) for i in _likeliest(row, sampling.num_logprobs))
    return Drawn(token_id, float(logprobs[token_id]), top)


def _sample(row: F32, best: float, sampling: Sampling, position: int) -> int:
    """Inverse of the cumulative distribution over tokens in the order of (-logit, id): temperature first, then top_k, then
    top_p of what top_k left.  Only as many tokens are put in order as the draw needs."""
    weights = np.exp((row.astype(np.float64) - best) / sampling.temperature)
    limit = min(sampling.top_k or len(row), len(row))
    # Without top_k the total is known before any order is; with it, the first top_k tokens are needed anyway.
    count = limit if limit < len(row) else min(_FIRST_LOOK, limit)
    chance = uniform(sampling.seed, position)
    while True:
        order = _likeliest(row, count)
        cumulative = weights[order].cumsum()
        total = float(cumulative[-1]) if count == limit else float(weights.sum())
        kept = count
        if sampling.top_p < 1:
            kept = int(cumulative.searchsorted(sampling.top_p * total)) + 1
            total = float(cumulative[min(kept, count) - 1])
        place = int(cumulative.searchsorted(chance * total, side="right"))
        if count == limit or (kept <= count and place < count):
            return int(order[min(place, kept - 1, count - 1)])
        count = min(count * 8, limit)


def _likeliest(row: F32, count: int) -> I64:
    """The ids of the ``count`` greatest logits, greatest first, lower ids first among equals."""
    if count == 0:
        return np.empty(0, np.int64)
    candidates = np.arange(len(row))
    if count < len(row):
        candidates = np.flatnonzero(row >= np.partition(row, -count)[-count])
    order: I64 = candidates[np.argsort(-row[candidates], kind="stable")][:count]
    return order
