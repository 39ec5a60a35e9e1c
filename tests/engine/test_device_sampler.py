"""Draws where the logits are, against the draws of the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.device_sampler import SamplingColumns, TopK, choose, drawn_tokens, torch_top_k
from services.engine.flashinfer_runner import top_k_of
from services.engine.sampler import draw
from services.engine.sampling_params import DrawFailed, Drawn, Sample, Sampling
from tests.engine import fake_flashinfer

top_k = top_k_of(fake_flashinfer)


def on_device(logits: torch.Tensor, samples: list[Sample], top_k: TopK = top_k
              ) -> tuple[list[Drawn | DrawFailed | None], list[int]]:  # fmt: skip
    """What is drawn where ``logits`` are, and the rows that the host had to look at."""
    fetched: list[int] = []

    def row(number: int) -> torch.Tensor:
        fetched.append(number)
        return logits[number]

    tokens = choose(logits, SamplingColumns.of(samples).to(logits.device), top_k).tolist()
    return drawn_tokens(tokens, samples, row), fetched


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 5, 300, 4000]),
    seed=st.integers(0, 2**64 - 1),
    num_logprobs=st.sampled_from([None, None, None, 0, 3]),
)


@st.composite
def draws(drawing: st.DrawFn, vocabs: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, list[Sample]]:
    """Logits on the host, flat or steep, with ties (in ``bfloat16`` always), and what to draw of each row."""
    params = drawing(st.lists(samplings, min_size=1, max_size=5))
    random = np.random.default_rng(drawing(st.integers(0, 1000)))
    logits = random.standard_normal((len(params), drawing(st.sampled_from(vocabs)))) * drawing(
        st.sampled_from([0.1, 3.0])
    )
    if drawing(st.booleans()):
        logits = logits.round(1)
    return torch.from_numpy(logits).to(dtype), [Sample(row, p, 5 + row) for row, p in enumerate(params)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=100)
@given(data=st.data())
def test_draws_are_those_of_the_host(dtype: torch.dtype, data: st.DataObject) -> None:
    logits, samples = data.draw(draws((40, 256, 3000), dtype))
    found, _ = on_device(logits, samples)
    assert found == draw(logits.float().numpy(), samples)


def test_peaked_draws_need_no_logits_on_the_host() -> None:
    logits = torch.randn((4, 50_000), generator=torch.Generator().manual_seed(0)) * 4
    samples = [Sample(row, Sampling(temperature=0.8, top_p=0.9, seed=row), row) for row in range(4)]
    found, fetched = on_device(logits, samples)
    assert found == draw(logits.numpy(), samples)
    assert fetched == []


def test_a_flat_distribution_is_drawn_from_on_the_host() -> None:
    logits = torch.zeros((1, 5000))
    samples = [Sample(0, Sampling(temperature=1.0, seed=3), 9)]
    found, fetched = on_device(logits, samples)
    assert found == draw(logits.numpy(), samples)
    assert fetched == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    logits = torch.randn((3, 400))
    logits[1, 399] = bad
    samples = [Sample(row, Sampling(temperature=temperature, seed=1), row) for row in range(3)]
    found, _ = on_device(logits, samples)
    assert [type(token) for token in found] == [Drawn, DrawFailed, Drawn]


def test_a_nan_that_top_k_does_not_see_fails_too() -> None:
    logits = torch.randn((1, 400))
    logits[0, 7] = float("nan")

    def blind(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch_top_k(rows.nan_to_num(-100.0), count)

    tokens = choose(logits, SamplingColumns.of([Sample(0, Sampling(), 0)]), blind)
    assert tokens.tolist() == [-2]


def test_what_is_behind_a_refused_draft_is_not_drawn() -> None:
    logits = torch.eye(4)[[2, 3, 1]] * 9
    samples = [Sample(0, Sampling(), 5, 2), Sample(1, Sampling(), 6, 0), Sample(2, Sampling(), 7, None)]
    found, _ = on_device(logits, samples)
    assert found == draw(logits.numpy(), samples) == [Drawn(2), Drawn(3), None]
