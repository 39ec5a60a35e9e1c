"""The cheapest fleets: none cheaper does, and the verdict follows from them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import product
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission import PATIENCE
from kvferry.bench.record import percentile
from kvferry.bench.slo import Slo
from kvferry.errors import InvalidRequestError
from services.planner.designs import (
    COLOCATED_CHUNKS,
    PREFILL_STEP_TOKENS,
    Design,
    Kind,
    Size,
    instances,
    num_devices,
    usd_per_hour,
    workers,
)
from services.planner.hardware import DEFAULT_CATALOGUE, Catalogue, Device, Measured, make_worker, read_catalogue
from services.planner.models import find_model
from services.planner.page import render
from services.planner.plan import Request, make_plan
from services.planner.search import Found, _grown, cheapest, size_again
from services.planner.simulator.cost_model import CostModel
from services.planner.sizing import Attained, Sizing, fewest, is_good
from services.planner.traffic import Traffic
from services.planner.verdict import judge

MODEL = find_model("smollm2-135m")
DEFAULT = read_catalogue(DEFAULT_CATALOGUE)
# One computes prompts four times as fast for the money, the other answers.
COMPUTES = CostModel(0.002, 0.0001, 0.0, 0.004, 0.0, 0.0001, 1e10)
ANSWERS = CostModel(0.002, 0.0004, 0.0, 0.001, 0.0, 0.0001, 1e10)


def catalogue(**costs: CostModel) -> Catalogue:
    def device(name: str, measured: CostModel) -> Device:
        return Device(name, {}, 0.0, 0.0, 0.0, 0.0, 1.0, DEFAULT.assumptions, Measured(measured, 1600, 16, 100_000))

    return replace(DEFAULT, devices={name: device(name, measured) for name, measured in costs.items()})


def some(count: int, rate: float, num_input: int, num_output: int) -> Traffic:
    random = np.random.default_rng(1)
    lengths = [np.maximum(2, random.poisson(mean, count)).astype(np.int32) for mean in (num_input, num_output)]
    return Traffic(np.cumsum(random.exponential(1 / rate, count)), *lengths, np.zeros(count, np.int32))


def unequal(count: int) -> Traffic:
    """One prompt in ten is thirty times as long."""
    traffic = some(count, 17.0, 100, 2)
    long = np.random.default_rng(2).random(count) < 0.1
    return replace(traffic, num_input=np.where(long, 3000, traffic.num_input).astype(np.int32))


def request(among: Catalogue, traffic: Traffic, slo: Slo, **changes: Any) -> Request:
    made = Request(
        trace="<b>.csv", traffic=traffic, rate=None, model=MODEL, dtype="bf16", catalogue=among,
        devices=list(among.devices), slo=slo, num_seeds=2, most_requests=10_000, sensitivity=False,
        patiences=(PATIENCE,),
    )  # fmt: skip
    return replace(made, **changes)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_the_fewest_are_found(needed: int, guess: int, most: int) -> None:
    assert fewest(lambda n: n >= needed, guess, most) == (needed if needed <= most else None)


@pytest.mark.parametrize("num_gaps", [1, 2, 99, 100, 101, 102, 201, 250])
def test_slow_gaps_as_the_load_harness_counts_them(num_gaps: int) -> None:
    """``kvferry bench`` bounds the 99th percentile of a request's own gaps."""
    sizing = Sizing(some(1, 1.0, 10, 10), Slo(itl=1.0))
    design = Design.colocated(workers(MODEL, catalogue(a=ANSWERS), "bf16", ["a"])[0], 512, 0.0)
    run = sizing.run(design, Size(0, 1))
    for slow in range(min(num_gaps, 5) + 1):
        gaps = [0.0] * (num_gaps - slow) + [1e6] * slow
        counted = replace(
            run, num_slow=np.array([slow], np.int32),
            traffic=replace(run.traffic, num_output=np.array([num_gaps + 1], np.int32)),
        )  # fmt: skip
        assert is_good(counted, Slo(itl=1.0))[1][0] == (percentile(gaps, 99) <= 1.0)


@pytest.mark.parametrize("slo", [Slo(ttft=0.5, itl=0.05), Slo(ttft=0.3, tpot=0.012), Slo(ttft=2.0, e2e=2.5)])
def test_none_is_cheaper(slo: Slo) -> None:
    """Against every fleet of up to seven of each."""
    traffic = some(200, 8.0, 600, 40)
    among = workers(MODEL, catalogue(computes=COMPUTES, answers=ANSWERS), "bf16", ["computes", "answers"])
    found = cheapest(Sizing(traffic, slo), among, PATIENCE, 0.9)
    everything = Sizing(traffic, slo)
    designs = [Design.colocated(*each) for each in product(among, COLOCATED_CHUNKS, [PATIENCE])]
    designs += [Design.split(*each) for each in product(among, among, PREFILL_STEP_TOKENS, [PATIENCE])]
    for kind in Kind:
        prices = [
            usd_per_hour(design, size)
            for design in designs
            if design.kind is kind
            for size in (Size(p, d) for p, d in product(range(1, 8) if design.prefill else (0,), range(1, 8)))
            if everything.attained(design, size).all >= 0.9
        ]
        one = found[kind]
        assert (one.usd_per_hour if one else None) == min(prices, default=None)
        if one is not None:
            assert everything.attained(one.design, one.size).all >= 0.9


def test_a_fleet_is_too_dear_only_when_nothing_can_be_taken_from_it() -> None:
    """Seven workers, of which three do: cheaper than five, that is."""

    class Enough:
        def attained(self, _: Design, size: Size) -> Attained:
            share = 1.0 if size.num_prefill >= 2 and size.num_decode >= 1 else 0.0
            return Attained(share, share, share)

    (worker,) = workers(MODEL, catalogue(answers=ANSWERS), "bf16", ["answers"])
    design, sizing = Design.split(worker, worker, 512, 0.0), cast(Sizing, Enough())
    found = _grown(sizing, design, Size(3, 4), 0.9, 5 * worker.usd_per_hour)
    assert found is not None
    assert found.size == Size(2, 1)
    assert _grown(sizing, design, Size(3, 4), 0.9, 3 * worker.usd_per_hour) is None


def test_the_order_of_the_line_is_chosen_too() -> None:
    """One prompt in ten takes thirty times as long: fewer workers do where the others need not wait for it."""
    traffic = unequal(2000)
    fifo, ours, both = (
        make_plan(
            request(catalogue(computes=COMPUTES), traffic, Slo(ttft=0.8), patiences=patiences), lambda done, what: None
        )
        for patiences in ((0.0,), (PATIENCE,), (0.0, PATIENCE))
    )
    late, early, chosen = (
        next(o.option for o in report.outcomes if (o.kind, o.share) == (Kind.COLOCATED.value, 0.9))
        for report in (fifo, ours, both)
    )
    assert late is not None
    assert early is not None
    assert early.usd_per_hour < late.usd_per_hour
    assert (late.patience, early.patience) == (0.0, PATIENCE)
    assert chosen == early
    for of_all, *of_one in zip(both.outcomes, fifo.outcomes, ours.outcomes, strict=True):
        prices = [each.option.usd_per_hour for each in of_one if each.option is not None]
        assert (None if of_all.option is None else of_all.option.usd_per_hour) == min(prices, default=None)
    assert ("patience of the gateway's line", "0 or 4") in both.assumptions
    assert both.verdict == judge(both.outcomes, 0.9, "") != both.strict_verdict
    assert both.strict_verdict == judge(both.outcomes, 0.99, "")


def test_what_was_simulated_is_remembered_for_its_own_design_alone() -> None:
    traffic = unequal(300)
    computes, answers = workers(MODEL, catalogue(a=COMPUTES, b=ANSWERS), "bf16", ["a", "b"])
    designs = [
        Design.colocated(worker, chunk, p) for worker in (computes, answers) for chunk in (64, 2048) for p in (0.0, 4.0)
    ]
    designs += [Design.split(computes, answers, step, p) for step in (512, 2048) for p in (0.0, 4.0)]
    slo = Slo(ttft=0.5, itl=0.03)
    together = Sizing(traffic, slo)
    for design in designs:
        size = Size(1 if design.prefill else 0, 1)
        assert together.attained(design, size) == Sizing(traffic, slo).attained(design, size), design
    found = {p: Sizing(unequal(2000), Slo(ttft=0.5)).prefill_alone(computes, 512, p, 0.9) for p in (0.0, 4.0)}
    assert found == {0.0: 2, 4.0: 1}
    once = Sizing(unequal(2000), Slo(ttft=0.5))
    assert {p: once.prefill_alone(computes, 512, p, 0.9) for p in (0.0, 4.0)} == found


def test_instances_are_paid_whole_and_shared_by_both_roles() -> None:
    model, devices = find_model("llama-3.1-8b"), DEFAULT.devices
    whole, other, single = (
        worker
        for name in ("p5.48xlarge", "p5en.48xlarge", "h100")
        if (worker := make_worker(model, devices[name], 2, "bf16")) is not None
    )
    for design, size, usd, rented in (
        (Design.colocated(whole, 256, 0.0), Size(0, 4), 55.04, {"p5.48xlarge": 1}),
        (Design.colocated(whole, 256, 0.0), Size(0, 5), 110.08, {"p5.48xlarge": 2}),
        (Design.split(whole, whole, 512, 0.0), Size(1, 3), 55.04, {"p5.48xlarge": 1}),
        (Design.split(whole, other, 512, 0.0), Size(1, 3), 118.336, {"p5.48xlarge": 1, "p5en.48xlarge": 1}),
        (Design.split(whole, single, 512, 0.0), Size(1, 3), 55.04 + 6 * 2.99, {"p5.48xlarge": 1}),
        (Design.split(single, single, 512, 0.0), Size(1, 3), 8 * 2.99, {}),
    ):
        assert usd_per_hour(design, size) == pytest.approx(usd)
        assert instances(design, size) == rented
        assert num_devices(design, size) == 2 * (size.num_prefill + size.num_decode)


def test_a_plan_in_whole_instances_says_so() -> None:
    traffic, llama = some(300, 60.0, 2000, 100), find_model("llama-3.1-8b")
    loose, whole = (
        make_plan(
            request(DEFAULT, traffic, Slo(ttft=2.0, itl=0.05), devices=[name], model=llama), lambda done, what: None
        )
        for name in ("h100", "p5.48xlarge")
    )
    one_by_one, option = loose.outcomes[0].option, whole.outcomes[0].option
    assert one_by_one is not None
    assert option is not None
    assert option.num_devices >= one_by_one.num_devices, "what is paid for anyway may serve"
    assert option.attained.mean >= one_by_one.attained.mean
    assert option.usd_per_hour == pytest.approx(55.04 * -(-option.num_devices // 8))
    assert option.instances == {"p5.48xlarge": -(-option.num_devices // 8)}
    assert " in 1 p5.48xlarge" in whole.verdict.reason
    assert option.num_decode == 8 // (option.num_devices // option.num_decode), "all that is paid for"
    assert option.decode.endswith("h100@p5.48xlarge")
    assert one_by_one.instances == {}


def test_instances_of_several_fleets_are_added_up() -> None:
    traffic, slo = some(3000, 3000.0, 2000, 20), Slo(ttft=2.0, itl=0.05)
    report = make_plan(
        request(DEFAULT, traffic, slo, devices=["p5.48xlarge"], model=find_model("llama-3.1-8b")),
        lambda done, what: None,
    )
    assert report.load.num_cells > 1
    options = [outcome.option for outcome in report.outcomes if outcome.option is not None]
    assert [option.kind for option in options] == 2 * ["colocated", "split, equal hardware"]
    for option in options:
        assert option.usd_per_hour == pytest.approx(55.04 * option.instances["p5.48xlarge"])


def test_a_split_fleet_keeps_what_its_instances_are_paid_for() -> None:
    """Two would do where four are as dear; five are dearer."""
    model = find_model("llama-3.1-8b")
    worker = make_worker(model, DEFAULT.devices["p5.48xlarge"], 2, "bf16")
    assert worker is not None
    sizing = Sizing(some(20, 0.5, 100, 5), Slo(ttft=5.0, itl=1.0))
    found = _grown(sizing, Design.split(worker, worker, 512, 0.0), Size(3, 2), 0.9, float("inf"))
    assert found is not None
    assert (found.size.num_prefill + found.size.num_decode, found.usd_per_hour) == (4, pytest.approx(55.04))
    one = Design.colocated(worker, 512, 0.0)
    assert size_again(sizing, Found(one, Size(0, 1), 0.0), 0.9) == Found(one, Size(0, 4), pytest.approx(55.04))


def test_hardware_of_two_kinds_is_split() -> None:
    devices = catalogue(computes=COMPUTES, answers=ANSWERS)
    report = make_plan(request(devices, some(1500, 60.0, 1000, 40), Slo(ttft=1.0, itl=0.1)), lambda done, what: None)
    assert report.verdict.split
    assert "prefill on computes, decode on answers" in report.verdict.headline
    assert report.verdict.split_saves is not None
    assert report.verdict.split_saves.mean > 0.05
    unequal = next(o.option for o in report.outcomes if o.kind == Kind.SPLIT_UNEQUAL.value)
    assert unequal is not None
    assert (unequal.prefill, unequal.decode) == ("computes", "answers")
    assert "first token goes from" in report.verdict.price
    alone = [replace(o, option=None) if o.kind == Kind.COLOCATED.value else o for o in report.outcomes]
    only = judge(alone, 0.9, "")
    assert report.strict_verdict == judge(report.outcomes, 0.99, "")
    assert only.split
    assert "only a split fleet" in only.headline
    assert "first token comes at" in only.price


def test_light_traffic_is_not_split() -> None:
    report = make_plan(
        request(catalogue(answers=ANSWERS), some(100, 0.5, 500, 40), Slo(ttft=1.0, itl=0.3)), lambda done, what: None
    )
    assert not report.verdict.split
    assert "100 % more" in report.verdict.headline
    assert "so light" in report.verdict.reason


def test_equal_hardware_is_split_where_gaps_are_strict() -> None:
    """Any chunk takes longer than a gap may: a colocated worker must then be all but alone with a request."""
    slow = replace(ANSWERS, prefill_token_s=0.001)
    strict, loose = (
        make_plan(
            request(catalogue(slow=slow), some(600, 20.0, 600, 40), Slo(ttft=2.0, itl=itl)), lambda done, what: None
        )
        for itl in (0.05, 2.0)
    )
    assert strict.verdict.split
    assert "equal hardware" in strict.verdict.headline
    assert "idle, or prompts delay" in strict.verdict.reason
    assert not loose.verdict.split


def test_what_nobody_keeps_is_said() -> None:
    report = make_plan(
        request(catalogue(answers=ANSWERS), some(50, 1.0, 600, 40), Slo(ttft=0.01)), lambda done, what: None
    )
    assert not report.verdict.split
    assert "No fleet was found" in report.verdict.headline
    assert "answers, with nobody else there" in report.verdict.reason
    assert "none found" in render(report)


def test_a_large_fleet_is_planned_as_several() -> None:
    devices = catalogue(answers=ANSWERS)
    small, large = (
        make_plan(request(devices, some(20000, rate, 300, 10), Slo(ttft=1.0)), lambda done, what: None)
        for rate in (100.0, 1000.0)
    )
    assert (small.load.num_cells, large.load.num_cells) == (1, 3)
    per_request = [report.outcomes[0].option.usd_per_hour / report.load.requests_per_s for report in (small, large)]
    assert per_request[1] == pytest.approx(per_request[0], rel=0.15)


def test_a_burst_is_not_thinned_by_what_is_around_it() -> None:
    """Ten times the rate for a moment, of which only so many requests are planned: several fleets, at the burst's rate."""
    quiet = some(20_000, 100.0, 300, 10)
    burst = some(3000, 1000.0, 300, 10)
    burst = replace(burst, arrive_s=60.0 + burst.arrive_s)
    order = np.argsort(np.concatenate([quiet.arrive_s, burst.arrive_s]))
    both = Traffic(*(np.concatenate([getattr(t, f) for t in (quiet, burst)])[order] for f in Traffic.__slots__))
    asked = request(catalogue(answers=ANSWERS), both, Slo(ttft=1.0), most_requests=2000)
    load = make_plan(asked, lambda done, what: None).load
    assert (load.num_cells, load.planned_requests) == (3, 2000)
    assert load.requests_per_s == pytest.approx(1100, rel=0.15)


@pytest.mark.parametrize("count", [1, 20, 5000])
def test_at_a_rate_a_fleet_does_not_depend_on_how_long_the_trace_is(count: int) -> None:
    same = replace(
        some(count, 10.0, 300, 10), num_input=np.full(count, 300, np.int32), num_output=np.full(count, 10, np.int32)
    )
    report = make_plan(
        request(catalogue(answers=ANSWERS), same, Slo(ttft=1.0), rate=1000.0, most_requests=5000),
        lambda done, what: None,
    )
    assert (report.load.num_cells, report.load.planned_requests) == (3, 5000)
    assert report.load.requests_per_s == pytest.approx(1000, rel=0.1)
    assert report.load.planned_s == pytest.approx(5, rel=0.1)
    assert report.outcomes[0].option is not None
    assert 120 <= report.outcomes[0].option.num_decode <= 150


def test_sensitivity_and_the_page() -> None:
    told: list[float] = []
    asked = request(
        replace(DEFAULT, devices={"h100": DEFAULT.devices["h100"]}), some(200, 5.0, 600, 40), Slo(ttft=1.0, itl=0.05),
        model=find_model("llama-3.1-8b"), sensitivity=True, patiences=(PATIENCE, 0.0),
    )  # fmt: skip
    report = make_plan(asked, lambda done, what: told.append(done))
    assert [row.what for row in report.sensitivity][:2] == ["as it is", "links between nodes 10 times slower"]
    assert told == sorted(told)
    assert 0 <= told[0] <= told[-1] <= 1
    assert report.roofline is not None
    points = dict(report.roofline.points)
    assert points["decode, batch of 1"] < report.roofline.ridge < points["prefill, chunk of 2048"]
    assert sum(window.prompt_tokens for window in report.windows) == asked.traffic.num_input.sum()
    part = make_plan(replace(asked, sensitivity=False, most_requests=50), lambda done, what: None)
    assert part.load.planned_requests == 50
    assert part.windows == report.windows, "of the whole trace"
    json.dumps(asdict(report))
    page = render(report)
    assert "&lt;b&gt;.csv" in page
    assert "<b>" not in page
    assert page.count("<svg") == 5
    # Nothing is fetched from anywhere.
    assert not any(word in page for word in ("http:", "https:", "src=", "@import", "url("))


def test_a_model_that_fits_nowhere_is_refused() -> None:
    asked = request(DEFAULT, some(10, 1.0, 100, 10), Slo(ttft=1.0), model=find_model("deepseek-v3"), devices=["l4"])
    with pytest.raises(InvalidRequestError, match="deepseek-v3 in bf16 runs on none of l4"):
        make_plan(asked, lambda done, what: None)
