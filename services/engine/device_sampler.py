"""Drawing tokens where the logits are, as ``sampler.draw`` does on the host: the same number, of (seed, position), decides.

FlashInfer's own sampling kernels draw by the row's number in its batch, so a request's tokens would depend on its company
and on the worker that continues it; its top_k is what is used of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.engine.device import pinned
from services.engine.sampler import draw, uniform
from services.engine.sampling_params import DrawFailed, Drawn, Sample

LOOK = 256  # tokens that are put in order; a draw that needs more is made on the host
_UNDECIDED, _NOT_FINITE = -1, -2

TopK = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """What ``n`` draws depend on besides logits: [4, n] float64, temperature, top_k, top_p and the number that decides."""

    values: torch.Tensor
    greedy: bool

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> SamplingColumns:
        """On the host.  Needs nothing of what the step computes."""
        rows = [
            (p.temperature, p.top_k, p.top_p, uniform(p.seed, position) if p.temperature else 0.0)
            for _, p, position, _ in samples
        ]
        values = torch.from_numpy(np.array(rows, np.float64).reshape(-1, 4).T.copy())
        return cls(values, all(sample.sampling.temperature == 0 for sample in samples))

    def to(self, device: torch.device) -> SamplingColumns:
        return SamplingColumns(pinned(self.values, device).to(device, non_blocking=True), self.greedy)


def choose(logits: torch.Tensor, columns: SamplingColumns, top_k: TopK) -> torch.Tensor:
    """[n] int64, on the device of ``logits``, [n, vocab]: the drawn tokens; ``_UNDECIDED`` where LOOK tokens are too few,
    ``_NOT_FINITE`` where there is nothing to draw from.  ``columns`` are on the same device.  Waits for nothing."""
    vocab = logits.shape[1]
    values, ids = top_k(logits, min(LOOK if not columns.greedy else 8, vocab))
    # By falling logit, the lower id first among equals, whatever order top_k gives those.
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, by_value)
    best = values[:, :1].double()
    failed = ~best.isfinite().squeeze(-1) | logits.isnan().any(-1)  # of NaN, top_k may see nothing
    if columns.greedy:
        return ids[:, 0].masked_fill(failed, _NOT_FINITE)
    temperature, limit, top_p, chance = (column[:, None] for column in columns.values)
    is_greedy = temperature == 0
    scale = temperature.masked_fill(is_greedy, 1)
    weights = ((values.double() - best) / scale).exp()
    cumulative = weights.cumsum(-1)
    looked = weights.shape[1]
    # From here on as ``sampler._sample`` has it, a row for each draw.
    limit = torch.where(limit == 0, vocab, limit).clamp(max=vocab)
    within_look = limit <= looked
    last = (limit.clamp(max=looked) - 1).long()
    # In float32, for all of a large vocabulary: 1e-7 of the whole, where the tokens in order are exact.
    total = ((logits.float() - best.float()) / scale.float()).exp().sum(-1, keepdim=True, dtype=torch.float64)
    total = torch.where(within_look & (limit < vocab), cumulative.gather(-1, last), total)
    count = last + 1
    kept = torch.searchsorted(cumulative, top_p * total) + 1
    cut = top_p < 1
    kept = torch.where(cut, kept, count)
    total = torch.where(cut, cumulative.gather(-1, torch.minimum(kept, count) - 1), total)
    place = torch.searchsorted(cumulative, chance * total, right=True)
    decided = within_look | ((limit == vocab) & (kept <= count) & (place < count))
    token = ids.gather(-1, torch.minimum(torch.minimum(place, kept - 1), count - 1))
    token = torch.where(is_greedy, ids[:, :1], token.masked_fill(~decided, _UNDECIDED)).squeeze(-1)
    return token.masked_fill(failed, _NOT_FINITE)


def drawn_tokens(
    tokens: Sequence[int], samples: Sequence[Sample], row: Callable[[int], torch.Tensor]
) -> list[Drawn | DrawFailed | None]:
    """What ``sampler.draw`` returns, of ``choose``'s tokens, on the host by now.  ``row`` fetches one sample's logits,
    [vocab], where the host must look at them: for a draw that was not decided, and for log-probabilities."""
    drawn: list[Drawn | DrawFailed | None] = []
    refused = False
    for number, (token_id, sample) in enumerate(zip(tokens, samples, strict=True)):
        token: Drawn | DrawFailed | None = None
        if not refused:
            plain = token_id >= 0 and sample.sampling.num_logprobs is None
            token = Drawn(token_id) if plain else _on_host(row(number), sample)
        drawn.append(token)
        accepted = isinstance(token, Drawn) and token.token_id == sample.draft
        refused = sample.draft is not None and not accepted
    return drawn


def _on_host(row: torch.Tensor, sample: Sample) -> Drawn | DrawFailed | None:
    return draw(row.float().cpu().numpy()[None], (sample,))[0]


def torch_top_k(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of equals at the edge any."""
    return logits.topk(count, dim=-1)
