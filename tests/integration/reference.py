"""Greedy decoding by transformers, to hold answers against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Reference:
    def __init__(self, model: Any) -> None:
        self._model = model

    def continuation_is_greedy(self, prompt: Sequence[int], output: Sequence[int]) -> bool:
        """Whether greedy decoding of ``prompt`` gives exactly ``output``: each of its tokens is the likeliest one after
        all before it.  One forward pass instead of one per token."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt, *output[:-1]]])).logits[0, len(prompt) - 1 :]
        return bool((logits.argmax(-1) == torch.tensor(output)).all())

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy decoding by transformers itself."""
        with torch.inference_mode():
            ids = torch.tensor([list(prompt)])
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens, pad_token_id=0,
                min_new_tokens=None, temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
        return [int(t) for t in out[0, len(prompt) :]]
