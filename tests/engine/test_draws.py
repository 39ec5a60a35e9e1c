"""What the kernels draw against what numpy draws, on every instruction set that this processor has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine import sampler
from services.engine.kernels.draws import F32, draw
from services.engine.kernels.library import instruction_sets
from services.engine.sampling_params import DrawFailed, Drawn, Sample, Sampling

SETS = instruction_sets()
KINDS = ("spread", "peaked", "tied", "flat", "rising", "with -inf")


def make_row(kind: str, size: int, seed: int) -> F32:
    random = np.random.default_rng(seed)
    row = random.standard_normal(size) * {"spread": 3, "peaked": 12}.get(kind, 1)
    if kind == "tied":
        row = row.round()
    if kind == "flat":
        row = np.zeros(size)
    if kind == "rising":
        row = np.arange(size) / size
    if kind == "with -inf":
        row[random.random(size) < 0.5] = -np.inf
        row[random.integers(size)] = 0.0
    return row.astype(np.float32)


@pytest.mark.parametrize("name", SETS)
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 5, 8, 9, 300, 5000, 49_152]),
    row_seed=st.integers(0, 9),
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 5.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 300, 4999, 5000, 99_999]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 10**6),
    num_logprobs=st.sampled_from([None, 0, 1, 20]),
)
def test_the_kernels_draw_what_numpy_draws(
    name: str, kind: str, size: int, row_seed: int, temperature: float, top_k: int, top_p: float, seed: int,
    position: int, num_logprobs: int | None,
) -> None:  # fmt: skip
    row = make_row(kind, size, row_seed)
    sampling = Sampling(temperature, top_p, top_k, seed, num_logprobs)
    samples = [Sample(0, sampling, position)]
    (ours,), (theirs,) = draw(row[None], samples, name), sampler.draw(row[None], samples)
    assert isinstance(ours, Drawn)
    assert isinstance(theirs, Drawn)
    assert ours.token_id == theirs.token_id
    assert (ours.logprob is None) == (theirs.logprob is None)
    if theirs.logprob is not None:
        assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-12, abs=1e-12)
        count = min(num_logprobs or 0, size)
        assert [token for token, _ in ours.top[:count]] == [token for token, _ in theirs.top]
        assert [p for _, p in ours.top[:count]] == pytest.approx([p for _, p in theirs.top], rel=1e-12, abs=1e-12)


def test_all_instruction_sets_say_the_same_to_the_last_bit() -> None:
    samples = [Sample(i, Sampling(0.2 + i, 0.9, 0, i, 20), i) for i in range(8)]
    logits = np.stack([make_row("spread", 5003, i) for i in range(8)])
    assert all(draw(logits, samples, name) == draw(logits, samples, SETS[0]) for name in SETS)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 7, 8, 20])
def test_what_is_not_finite_fails_its_own_row_only(name: str, bad: float, place: int) -> None:
    rows = np.stack([make_row("spread", 21, i) for i in range(3)])
    if bad == -np.inf:
        rows[1] = bad
    rows[1, place] = bad
    sampling = Sampling(temperature=1.0, num_logprobs=3)
    found = draw(rows, [Sample(i, replace(sampling, seed=i), 4) for i in range(3)], name)
    assert [type(each) for each in found] == [Drawn, DrawFailed, Drawn]
    assert found[1] == DrawFailed("the model's logits for position 4 are not finite")
