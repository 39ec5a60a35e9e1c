"""What the kernels are told about drawing, and what they answer: see draw.c."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.engine.kernels.library import instruction_sets, load
from services.engine.sampling_params import DrawFailed, Drawn, Sample
from services.engine.steps import Draws

F32 = npt.NDArray[np.float32]

_SAMPLING = np.dtype(
    [
        ("temperature", "f8"),
        ("top_p", "f8"),
        ("top_k", "i8"),
        ("seed", "u8"),
        ("position", "i8"),
        ("num_logprobs", "i8"),
    ]
)
_DRAWN = np.dtype([("token_id", "i8"), ("logprob", "f8")])


class DrawMemory:
    """Arrays that the kernels read and write: for n samples, [n] of ``sampling`` and ``drawn``, and [n, most alternatives]
    of ``top``, token ids, and ``top_logprobs``."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self.sampling = np.array([_sampling(sample) for sample in samples], dtype=_SAMPLING)
        self.drawn = np.zeros(len(samples), dtype=_DRAWN)
        self.stride = max((sample.sampling.num_logprobs or 0 for sample in samples), default=0)
        self.top = np.zeros((len(samples), self.stride), dtype=np.int64)
        self.top_logprobs = np.zeros((len(samples), self.stride), dtype=np.float64)

    def draws(self) -> Draws:
        return [self._draw(i, token_id) for i, token_id in enumerate(self.drawn["token_id"].tolist())]

    def _draw(self, i: int, token_id: int) -> Drawn | DrawFailed:
        sample = self._samples[i]
        if token_id < 0:
            return DrawFailed(f"the model's logits for position {sample.position} are not finite")
        count = sample.sampling.num_logprobs
        if count is None:
            return Drawn(token_id)
        top = zip(self.top[i, :count].tolist(), self.top_logprobs[i, :count].tolist(), strict=True)
        return Drawn(token_id, float(self.drawn["logprob"][i]), tuple(top))


def draw(logits: F32, samples: Sequence[Sample], instruction_set: str | None = None) -> Draws:
    """As ``sampler.draw``, row by row, but every row is drawn from, those behind refused drafts too."""
    memory = DrawMemory(samples)
    name = (instruction_set or instruction_sets()[0]).encode()
    rows = np.ascontiguousarray(logits)
    for i, row in enumerate(rows):
        found = (memory.sampling[i:], memory.drawn[i:], memory.top[i:], memory.top_logprobs[i:])
        if load().kvf_draw_row(name, row.ctypes.data, len(row), *(array.ctypes.data for array in found)) != 0:
            raise MemoryError(f"no memory to draw one of {len(row)} tokens")
    return memory.draws()


def _sampling(sample: Sample) -> tuple[float, float, int, int, int, int]:
    by = sample.sampling
    num_logprobs = -1 if by.num_logprobs is None else by.num_logprobs
    return by.temperature, by.top_p, by.top_k, by.seed, sample.position, num_logprobs
