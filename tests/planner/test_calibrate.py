"""The fit finds what made the times; and the real engine, with a tiny model, is measured end to end by the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvferry.cli import make_app
from services.engine.step_sums import Shares
from services.planner.calibrate.fit import SumsFit, fit, fit_sums, spread_of, spread_of_error
from services.planner.simulator.cost_model import CostModel, shares
from tests.tiny_model import save_tiny_model

STEPS = [
    *(shares([(count, start)]) for count in (32, 128, 256) for start in (0, 768)),
    *(shares([(1, context - 1)] * batch) for batch in (1, 4, 12) for context in (128, 1024)),
]
PRICES = st.floats(1e-9, 1e-2)


@given(st.tuples(PRICES, PRICES, PRICES, PRICES, PRICES))
def test_exact_times_give_back_their_prices(prices: tuple[float, ...]) -> None:
    times = [sum(n * s for n, s in zip(step, prices, strict=True)) for step in STEPS]
    found = fit(STEPS, times)
    assert found.max_error < 1e-6
    again = [sum(n * s for n, s in zip(step, found.prices, strict=True)) for step in STEPS]
    assert again == pytest.approx(times, rel=1e-6)


def test_prices_are_of_what_steps_take_on_the_average_though_delays_are_on_top() -> None:
    """One step in ten has a prompt, and long steps vary less.  By what each took itself the price of a step that decodes
    would be 9 % too low, and the prompts', by which the whole comes out right, too high."""
    prices, random = (0.003, 0.0005, 0.0, 0.0005, 0.0), Random(1)
    costs = CostModel(*prices, 0.0, 1.0, spread_of_error(0.35))
    steps = [shares([(1, 100)] * (1 + n % 4) + [(64, 0)] * (n % 10 == 0)) for n in range(20_000)]
    means = [sum(n * s for n, s in zip(step, prices, strict=True)) for step in steps]
    times = [costs.scattered_s(mean_s, random) for mean_s in means]

    def of_one(sums: Sums) -> float:
        found = fit_sums(*sums)
        return sum(n * s for n, s in zip(shares([(1, 100)]), found.prices, strict=True))

    assert of_one(sums_of(steps, times, means)) == pytest.approx(0.0035, rel=0.01)
    assert of_one(sums_of(steps, times)) < 0.0035 * 0.95
    assert fit_sums(*sums_of(steps, times, means)).rms_error == pytest.approx(0.3, rel=0.1)


@given(st.lists(st.floats(1e-4, 1.0), min_size=len(STEPS), max_size=len(STEPS)))
def test_no_price_is_negative_and_the_error_is_told(times: list[float]) -> None:
    found = fit(STEPS, times)
    assert all(price >= 0 for price in found.prices)
    assert 0 <= found.median_error <= found.max_error
    assert 0 <= found.rms_error <= found.max_error + 1e-12


Sums = tuple[float, list[float], list[float], list[float], float]


def sums_of(steps: Sequence[Shares], times: Sequence[float], expected: Sequence[float] | None = None) -> Sums:
    matrix, seconds, expecting = np.array(steps), np.array(times), np.array(expected or times)
    ratios, late, weights = matrix / expecting[:, None], seconds / expecting, 1 + matrix[:, 3]
    weighed = weights[:, None] * ratios
    products = (ratios.T @ weighed)[np.triu_indices(matrix.shape[1])].tolist()
    squares = float(weights @ late**2)
    return float(seconds.sum()), matrix.sum(axis=0).tolist(), (late @ weighed).tolist(), products, squares


@given(st.tuples(PRICES, PRICES, PRICES, PRICES, PRICES))
def test_sums_give_back_the_times_that_made_them(prices: tuple[float, ...]) -> None:
    times = [sum(n * s for n, s in zip(step, prices, strict=True)) for step in STEPS]
    found = fit_sums(*sums_of(STEPS, times))
    assert found.rms_error < 1e-3
    again = [sum(n * s for n, s in zip(step, found.prices, strict=True)) for step in STEPS]
    assert again == pytest.approx(times, rel=1e-3)


@given(st.lists(st.floats(1e-4, 1.0), min_size=len(STEPS), max_size=len(STEPS)))
def test_whatever_steps_take_the_whole_time_is_theirs(times: list[float]) -> None:
    found = fit_sums(*sums_of(STEPS, times))
    assert all(price >= 0 for price in found.prices)
    predicted = sum(n * s for step in STEPS for n, s in zip(step, found.prices, strict=True))
    assert predicted == pytest.approx(sum(times))


def test_what_never_was_in_a_step_has_no_price() -> None:
    decodes = [shares([(1, context - 1)] * batch) for batch in (1, 4, 12) for context in (128, 1024)]
    times = [0.01 + 0.002 * step[3] + 1e-6 * step[4] for step in decodes]
    step_s, token_s, pair_s, sequence_s, context_s = fit_sums(*sums_of(decodes, times)).prices
    assert (token_s, pair_s) == (0, 0)
    assert (step_s, sequence_s, context_s) == pytest.approx((0.01, 0.002, 1e-6))


def test_simulated_steps_scatter_as_those_that_decoded() -> None:
    found = SumsFit((0.01, 0.0, 0.0, 0.002, 0.0), 0.1)
    costs = CostModel(*found.prices, 0.0, 1.0, spread_of([4, 4 * 0.02, 4 * -0.03, 4 * (0.03**2 + 0.3**2)], found))
    random = Random(1)
    taken = np.log([costs.scattered_s(0.02, random) for _ in range(20000)])
    assert taken.std() == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize("scatter", [(), (0, 0, 0, 0), (1, 0.01, 0.1, 0.01)])
def test_where_steps_did_not_tell_they_scatter_by_the_error_of_the_fit(scatter: tuple[float, ...]) -> None:
    assert spread_of(scatter, SumsFit((0.01, 0.0, 0.0, 0.002, 0.0), 0.1)) == spread_of_error(0.1)


def test_steps_by_the_error_of_the_fit_deviate_so_much() -> None:
    costs, random = CostModel(0.01, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, spread_of_error(0.2)), Random(1)
    taken = np.array([costs.scattered_s(0.01, random) for _ in range(20_000)])
    assert taken.std() / 0.01 == pytest.approx(0.2, rel=0.05)
    assert taken.mean() == pytest.approx(0.01, rel=0.01)


def test_without_a_price_of_the_step_they_scatter_by_the_error_of_the_fit() -> None:
    assert spread_of((9, 0.09, 0.0, 0.9), SumsFit((0.0, 0.0, 0.0, 0.002, 0.0), 0.1)) == spread_of_error(0.1)


@pytest.mark.parametrize(
    "sums", [(0.0, [0.0] * 5, [0.0] * 5, [0.0] * 15, 0.0), (1.0, [1.0] * 5, [1.0] * 5, [1.0] * 9, 1.0)]
)
def test_no_sums_have_no_prices(sums: Sums) -> None:
    with pytest.raises(ValueError):
        fit_sums(*sums)


def test_the_command_measures_the_engine_and_writes_costs(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    out = tmp_path / "costs.json"
    asked = ["calibrate", "--model", str(tmp_path / "model"), "--rounds", "1", "--json", str(out)]
    done = CliRunner().invoke(make_app(rich=False), asked)
    assert done.exit_code == 0, done.output
    read = json.loads(out.read_text())
    costs = CostModel(**read["costs"])
    assert costs.step_s + costs.prefill_token_s + costs.decode_sequence_s > 0
    assert read["block_nbytes"] > 0
    assert f"within {read['median_error']:.1%}" in done.stdout


def test_a_model_that_is_not_there_is_one_sentence() -> None:
    done = CliRunner().invoke(make_app(rich=False), ["calibrate", "--model", "/nowhere"])
    assert done.exit_code == 1
    assert "there is no model at '/nowhere'" in done.stderr
