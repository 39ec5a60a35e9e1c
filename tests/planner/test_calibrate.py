"""The fit finds what made the times; and the real engine, with a tiny model, is measured end to end by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvferry.cli import make_app
from services.planner.calibrate.fit import fit
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


@given(st.lists(st.floats(1e-4, 1.0), min_size=len(STEPS), max_size=len(STEPS)))
def test_no_price_is_negative_and_the_error_is_told(times: list[float]) -> None:
    found = fit(STEPS, times)
    assert all(price >= 0 for price in found.prices)
    assert 0 <= found.median_error <= found.max_error


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
