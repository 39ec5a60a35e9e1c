from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.sampler import draw, uniform
from services.engine.sampling_params import DrawFailed, Drawn, Sample, Sampling

LOGITS = (np.random.default_rng(1).standard_normal((6, 5000)) * 3).astype(np.float32)


def one(row: np.ndarray[tuple[int], np.dtype[np.float32]], position: int = 0, **parameters: float) -> Drawn:
    drawn = draw(row[None], [Sample(0, Sampling(**parameters), position)])[0]  # type: ignore[arg-type]
    assert isinstance(drawn, Drawn)
    return drawn


def naive(row: np.ndarray[tuple[int], np.dtype[np.float32]], sampling: Sampling, position: int) -> int:
    """Everything sorted, everything normalized."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    weights = np.exp((row[order].astype(np.float64) - float(row.max())) / sampling.temperature)
    if sampling.top_k:
        weights[sampling.top_k :] = 0
    weights /= weights.sum()
    if sampling.top_p < 1:
        before = np.concatenate([[0.0], weights.cumsum()[:-1]])
        weights[before >= sampling.top_p] = 0
        weights /= weights.sum()
    return order[int(np.flatnonzero(weights.cumsum() > uniform(sampling.seed, position))[0])]


def philox(key: int, counter: int) -> int:
    """The first of the four words of Philox4x64-10 (Salmon et al., SC 2011)."""
    word = 2**64 - 1
    x, k = [counter, 0, 0, 0], [key, 0]
    for _ in range(10):
        first, second = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [(second >> 64) ^ x[1] ^ k[0], second & word, (first >> 64) ^ x[3] ^ k[1], first & word]
        k = [(k[0] + 0x9E3779B97F4A7C15) & word, (k[1] + 0xBB67AE8584CAA73B) & word]
    return x[0]


def test_greedy_is_the_lowest_of_the_likeliest() -> None:
    assert one(np.array([0, 2, 1, 2], np.float32)).token_id == 1


@given(
    row=st.integers(0, 5),
    temperature=st.sampled_from([0.3, 1.0, 5.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 300, 4999, 5000, 9999]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 10**6),
)
def test_draws_are_the_inverse_of_the_distribution(row: int, temperature: float, top_k: int, top_p: float, seed: int,
                                                   position: int) -> None:  # fmt: skip
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    (drawn,) = draw(LOGITS[row][None], [Sample(0, sampling, position)])
    assert isinstance(drawn, Drawn)
    assert drawn.token_id == naive(LOGITS[row], sampling, position)


def test_equal_logits_are_ordered_by_id() -> None:
    flat = np.zeros(5000, np.float32)
    for position in range(50):
        assert one(flat, position, temperature=1.0, top_k=40).token_id == int(uniform(0, position) * 40)
        assert one(flat, position, temperature=1.0).token_id == int(uniform(0, position) * 5000)


def test_a_draw_does_not_depend_on_its_batch() -> None:
    samples = [Sample(n, Sampling(temperature=0.2 * n, seed=n, top_p=0.9, num_logprobs=n), 10 + n) for n in range(6)]
    together = draw(LOGITS, samples)
    alone = [draw(LOGITS[n][None], [samples[n]])[0] for n in range(6)]
    assert together == alone
    assert draw(LOGITS[::-1], samples[::-1]) == alone[::-1]


def test_nothing_is_drawn_behind_a_refused_draft() -> None:
    greedy = [int(row.argmax()) for row in LOGITS]
    samples = [Sample(0, Sampling(), 1, greedy[0]), Sample(1, Sampling(), 2, greedy[1] + 1), Sample(2, Sampling(), 3, 4),
               Sample(3, Sampling(), 4), Sample(4, Sampling(), 1), Sample(5, Sampling(), 1, greedy[5])]  # fmt: skip
    logits = LOGITS[:6].copy()
    logits[2:4] = np.nan
    drawn = [token and cast(Drawn, token).token_id for token in draw(logits, samples)]
    assert drawn == [*greedy[:2], None, None, *greedy[4:6]]


def test_seed_and_position_decide() -> None:
    draws = [
        [one(LOGITS[0], position, temperature=2.0, seed=seed).token_id for position in range(20)] for seed in (4, 5)
    ]
    again = [one(LOGITS[0], position, temperature=2.0, seed=4).token_id for position in range(20)]
    assert draws[0] == again
    assert draws[0] != draws[1]
    assert len(set(draws[0])) > 10


def test_the_generator_is_the_published_one() -> None:
    # A change here would change the continuation of every request that moves between versions of a worker.
    for seed, position in [(0, 0), (1, 2), (2**64 - 1, 8191), (12345, 2**32)]:
        assert uniform(seed, position) == (philox(seed, position + 1) >> 11) / 2**53


def test_frequencies_follow_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    row = np.log(probabilities).astype(np.float32)
    count = 4000
    counts = np.bincount(
        [one(row, position, temperature=1.0, seed=42).token_id for position in range(count)], minlength=4
    )
    chi_square = float((((counts - count * probabilities) ** 2) / (count * probabilities)).sum())
    assert chi_square < 16.3  # one in a thousand, with three degrees of freedom
    sharpened = np.bincount([one(row, p, temperature=0.5, seed=42).token_id for p in range(count)], minlength=4)
    squared = probabilities**2 / (probabilities**2).sum()
    assert float((((sharpened - count * squared) ** 2) / (count * squared)).sum()) < 16.3


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(1e-9, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.8, {0, 1, 2})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, allowed: set[int]) -> None:
    row = np.log2(np.array([0.5, 0.25, 0.125, 0.125])).astype(np.float32) * np.float32(np.log(2))
    # The logits are rounded, so a bound that equals a sum exactly may fall to either side.
    nudged = top_p - 1e-6 if top_p in (0.5, 0.75) else top_p
    seen = {one(row, position, temperature=1.0, top_p=nudged).token_id for position in range(300)}
    assert seen == allowed


def test_top_p_counts_after_top_k() -> None:
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    # Of the two kept, the first has 4/7 > 0.55: alone it is enough, though it is 0.4 of the whole.
    assert {one(row, p, temperature=1.0, top_k=2, top_p=0.55).token_id for p in range(200)} == {0}


def test_tiny_and_huge_temperatures() -> None:
    assert one(LOGITS[2], temperature=1e-6).token_id == int(LOGITS[2].argmax())
    assert len({one(LOGITS[2], p, temperature=100.0).token_id for p in range(100)}) > 90


def test_logprobs_are_of_the_raw_distribution() -> None:
    row = LOGITS[3]
    expected = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    drawn = one(row, temperature=3.0, top_k=7, seed=8, num_logprobs=5)
    assert drawn.logprob == pytest.approx(expected[drawn.token_id])
    best = np.argsort(-row, kind="stable")[:5]
    assert [token_id for token_id, _ in drawn.top] == best.tolist()
    assert [logprob for _, logprob in drawn.top] == pytest.approx(expected[best].tolist())
    assert one(row, num_logprobs=0).top == ()
    assert one(row).logprob is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_fail_their_own_row_only(bad: float) -> None:
    rows = LOGITS[:2].copy()
    rows[0, 17] = bad
    sick, well = draw(rows, [Sample(0, Sampling(), 3), Sample(1, Sampling(), 3)])
    assert isinstance(sick, DrawFailed)
    assert "position 3" in sick.message
    assert well == one(LOGITS[1], 3)
