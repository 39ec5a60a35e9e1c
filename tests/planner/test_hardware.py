"""The catalogue: read whole or refused by name; its rooflines are those of the engine's own accounts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kvferry.errors import InvalidRequestError
from services.engine.phases import Ceilings, Piece, demand_of
from services.engine.phases import ModelShape as EngineShape
from services.planner.hardware import DEFAULT_CATALOGUE, make_worker, read_catalogue
from services.planner.models import find_model
from services.planner.simulator.cost_model import CostModel
from services.planner.step_cost import batch, chunk

CATALOGUE = read_catalogue(DEFAULT_CATALOGUE)
LLAMA = find_model("llama-3.1-8b")


def with_a_measured_device(path: Path) -> str:
    """The default catalogue and one called mine, whose costs are in ``path``."""
    costs = CostModel(0.01, 0.0005, 5e-8, 0.001, 1e-6, 0.001, 1e9)
    (path / "cpu.json").write_text(json.dumps({"costs": asdict(costs), "block_nbytes": 160}))
    mine = '\n[devices.mine]\ncosts = "cpu.json"\nkv_tokens = 5000\nusd_per_hour = 1\n'
    return DEFAULT_CATALOGUE.read_text() + mine


@pytest.mark.parametrize("device", ["h100", "l4", "xeon-48c"])
def test_a_step_takes_the_roofline_of_what_the_engine_counts(device: str) -> None:
    """At peaks that are reached, without overhead; a chunk's head and the embedding's rows are left out here."""
    ideal = replace(CATALOGUE.devices[device].assumptions, mfu=1.0, mbu=1.0, step_overhead_ms=0.0)
    found = replace(CATALOGUE.devices[device], assumptions=ideal)
    worker = make_worker(LLAMA, found, 1, "bf16")
    assert worker is not None
    ceilings = Ceilings(found.peak_tflops["bf16"] * 1e12, found.bandwidth_gbytes_per_s * 1e9)
    shape = EngineShape(32, 4096, 32, 8, 128, 14336, 128256, None, 2.0, 2.0, 2)
    for pieces, terms in (
        ([Piece(2048, 4096, 1)], chunk(2048, 2048)),
        ([Piece(32, 32, 1)], chunk(32)),
        ([Piece(1, 2000, 1)] * 64, batch(64, 2000)),
    ):
        assert worker.cost.step_s(terms) == pytest.approx(ceilings.seconds(demand_of(shape, pieces)), rel=0.005)


def test_ranks_share_the_work_and_pay_for_it() -> None:
    one, four = (make_worker(LLAMA, CATALOGUE.devices["h100"], tp, "bf16") for tp in (1, 4))
    assert one is not None
    assert four is not None
    assert one.cost.parts(chunk(2048))[1] / four.cost.parts(chunk(2048))[1] == pytest.approx(4)
    assert four.cost.parts(chunk(2048))[0] > one.cost.parts(chunk(2048))[0]
    assert four.kv_tokens > 4 * one.kv_tokens
    assert four.usd_per_hour == 4 * one.usd_per_hour


def test_more_ranks_than_kv_heads_copy_kv() -> None:
    model = replace(LLAMA, num_kv_shards=2)
    device = CATALOGUE.devices["h100"]
    eight, whole = make_worker(model, device, 8, "bf16"), make_worker(LLAMA, device, 8, "bf16")
    assert eight is not None
    assert whole is not None
    assert whole.kv_tokens == pytest.approx(4 * eight.kv_tokens, rel=1e-3)


@pytest.mark.parametrize(
    ("device", "tp", "model", "dtype"),
    [
        ("h100", 1, "llama-3.1-70b", "bf16"),  # too large
        ("a100-80g", 1, "llama-3.1-8b", "fp8"),  # no such unit
        ("xeon-48c", 2, "llama-3.1-8b", "bf16"),  # nothing between devices
        ("h100", 2, "smollm2-135m", "bf16"),  # nine heads
    ],
)
def test_what_does_not_run_is_no_worker(device: str, tp: int, model: str, dtype: str) -> None:
    assert make_worker(find_model(model), CATALOGUE.devices[device], tp, dtype) is None


def test_measured_costs_stand_for_a_roofline(tmp_path: Path) -> None:
    text = with_a_measured_device(tmp_path)
    (tmp_path / "mine.toml").write_text(text)
    worker = make_worker(LLAMA, read_catalogue(tmp_path / "mine.toml").devices["mine"], 1, "bf16")
    assert worker is not None
    assert worker.cost.step_s(chunk(100)) == pytest.approx(0.01 + 100 * 0.0005 + 5000 * 5e-8)
    assert (worker.kv_tokens, worker.kv_token_nbytes, worker.link_bytes_per_s) == (5000, 10, 1e9)


def test_an_instance_is_its_devices_rented_together() -> None:
    device, instance = CATALOGUE.devices["h100"], CATALOGUE.devices["p5.48xlarge"]
    assert instance == replace(device, name="h100@p5.48xlarge", usd_per_hour=6.88, rented=8, instance="p5.48xlarge")
    slower = CATALOGUE.devices["p4de.24xlarge"]
    assert slower.link_gbytes_per_s == 6.25 < CATALOGUE.devices["a100-80g"].link_gbytes_per_s
    assert {"h100", "xeon-48c"} <= set(CATALOGUE.one_by_one)
    assert not any("xlarge" in name for name in CATALOGUE.one_by_one)


def test_an_instance_of_measured_devices_has_the_link_that_was_measured(tmp_path: Path) -> None:
    text = with_a_measured_device(tmp_path)
    text += '[instances.two]\ndevice = "mine"\ncount = 2\nusd_per_hour = 3\n'
    (tmp_path / "mine.toml").write_text(text)
    assert read_catalogue(tmp_path / "mine.toml").devices["two"].usd_per_hour == 1.5
    (tmp_path / "mine.toml").write_text(text + "link_gbytes_per_s = 1\n")
    with pytest.raises(InvalidRequestError, match=r"instances\.two\] has link_gbytes_per_s"):
        read_catalogue(tmp_path / "mine.toml")


def test_ranks_of_a_worker_are_in_one_instance() -> None:
    alone = CATALOGUE.devices["p5.4xlarge"]
    assert [make_worker(LLAMA, alone, tp, "bf16") is not None for tp in (1, 2, 8)] == [True, False, False]
    six = replace(CATALOGUE.devices["p5.48xlarge"], rented=6)
    assert [make_worker(LLAMA, six, tp, "bf16") is not None for tp in (1, 2, 4)] == [True, True, False]


@pytest.mark.parametrize(
    ("was", "becomes", "named"),
    [
        ("mfu = 0.5 ", "mfu = -1 ", "mfu = -1"),
        ("mbu = 0.7 ", "", "lacks mbu"),
        ("usd_per_hour = 2.99", "usd_per_day = 2.99", "usd_per_day"),
        ("usd_per_hour = 2.99", 'usd_per_hour = "2.99"', "usd_per_hour = '2.99'"),
        ("memory_gbytes = 80.0", "memory_gbytes = 0", "memory_gbytes = 0"),
        ("memory_gbytes = 80.0", "", r"devices\.h100\] lacks memory_gbytes"),
        ("bf16 = 989.0, fp8", "fp4 = 989.0, fp8", "fp4"),
        ("[devices.h100]", "[device.h100]", "'device' means nothing"),
        ("[assumptions]", "[assumptions", "no TOML"),
        ("mfu = 0.5 ", f"mfu = {'5' * 5000} ", "no TOML"),
        ("mfu = 0.5 ", f"mfu = {'[' * 5000} ", "no TOML"),
        ('device = "a100-80g"', 'device = "a100"', r"instances\.p4de\.24xlarge\] says device = 'a100'; there are h100"),
        ('device = "a100-80g"\n', "", "says device = None"),
        ('device = "a100-80g"', 'gpu = "a100-80g"', "has 'gpu'"),
        ("count = 8\n", "", r"\[instances\.p4de\.24xlarge\] lacks count"),
        ("count = 8\n", "count = 0\n", "count = 0"),
        ("count = 8\n", "count = 2.5\n", "count = 2.5; it must be a whole number"),
        ('[instances."p4de.24xlarge"]', "[instances.h100]", r"\[instances\.h100\] has the name of a device"),
        ('[instances."p4de.24xlarge"]', "[[instances]]", "instances is no table|no TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, was: str, becomes: str, named: str) -> None:
    text = DEFAULT_CATALOGUE.read_text()
    assert was in text
    (tmp_path / "mine.toml").write_text(text.replace(was, becomes, 1))
    with pytest.raises(InvalidRequestError, match=named):
        read_catalogue(tmp_path / "mine.toml")
