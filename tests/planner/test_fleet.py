"""The coarse fleet: exact where one request is alone, true to the fine simulator where many meet, and nothing lost."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.candidates import Role
from gateway.routing import Policy
from services.engine.scheduler import Limits
from services.planner.fleet import AT_ONCE, Fleet, Gateway, Link, Pool, Run, simulate
from services.planner.simulator.arrivals import Arrival
from services.planner.simulator.cluster import Cluster, ViewDelays
from services.planner.simulator.cost_model import CostModel
from services.planner.simulator.worker import WorkerSpec
from services.planner.step_cost import StepCost, calibrated
from services.planner.traffic import Traffic

COSTS = CostModel(0.01, 0.0005, 5e-8, 0.001, 1e-6, 0.001, 1e9)
KV_NBYTES = 23040
Ask = tuple[float, int, int, int]  # when, prompt, answer, cached


def traffic(asks: list[Ask]) -> Traffic:
    at, *counts = zip(*sorted(asks), strict=True)
    return Traffic(np.array(at), *(np.array(each, np.int32) for each in counts))


def fleet(
    num_prefill: int, num_decode: int, costs: CostModel = COSTS, kv_tokens: int = 64000, gateway: Gateway = AT_ONCE
) -> Fleet:
    cost = calibrated(costs)
    decode = Pool(num_decode, cost, 256, kv_tokens, 64)
    if not num_prefill:
        return Fleet(decode, gateway=gateway)
    rate = costs.transfer_bytes_per_s
    link = Link(KV_NBYTES, rate, rate, costs.round_trip_s)
    return Fleet(decode, Pool(num_prefill, cost, 256, kv_tokens, 64), link, gateway)


def test_a_request_alone_takes_what_its_steps_take() -> None:
    """A step of 256 prompt tokens, one of 44, and 2 of decoding."""
    run = simulate(fleet(0, 3), traffic([(1.0, 300, 3, 0)]))
    prefill_s = 2 * 0.01 + 300 * 0.0005 + (256 * 128 + 44 * (256 + 22)) * 5e-8
    assert run.ttft_s[0] == pytest.approx(prefill_s)
    assert run.end_s[0] - run.first_s[0] == pytest.approx(2 * (0.01 + 0.001) + (301 + 302) * 1e-6)


@pytest.mark.parametrize("num_prefill", [0, 1])
def test_a_request_is_on_its_way_to_its_worker_for_so_long(num_prefill: int) -> None:
    load = traffic([(1.0, 300, 3, 0), (9.0, 300, 3, 0)])
    at_once, sent = (
        simulate(fleet(num_prefill, 1, gateway=Gateway(dispatch_s=dispatch_s)), load) for dispatch_s in (0.0, 0.25)
    )
    assert sent.ttft_s == pytest.approx(at_once.ttft_s + 0.25)
    assert sent.e2e_s == pytest.approx(at_once.e2e_s + 0.25)


def test_steps_scatter_about_what_they_cost() -> None:
    """One answer of 20,000 tokens; its steps take 11 ms on the average, a tenth of which is no step's own."""
    asks = traffic([(0.0, 16, 20_000, 0)])
    costs = replace(COSTS, decode_context_token_s=0.0)
    steady, scattered, again = (simulate(fleet(0, 1, replace(costs, spread=s)), asks) for s in (0.0, 0.3, 0.3))
    assert scattered.end_s[0] == again.end_s[0]
    assert scattered.end_s[0] == pytest.approx(steady.end_s[0], rel=0.01)
    for rank, late in ((10, 0.02), (50, 0.49), (90, 2.65)):  # of a gamma's with 0.55 for its shape and 1 for its mean
        assert scattered.itl_s(rank) == pytest.approx(0.011 * (1 + 0.3 * (late - 1)), rel=0.02)


def test_both_simulators_scatter_steps_alike() -> None:
    costs, draws = replace(COSTS, spread=0.3), random.Random(1)
    taken = np.array([costs.scattered_s(0.04, draws) for _ in range(20_000)])
    assert taken.mean() == pytest.approx(0.04, rel=0.01)
    assert taken.std() / 0.04 == pytest.approx(0.3 / 2**0.5, rel=0.03)  # two delays
    assert taken.min() / 0.04 > 1 - 0.3
    run = simulate(
        fleet(0, 1, replace(costs, step_s=0.01, decode_sequence_s=0.03, decode_context_token_s=0.0)),
        traffic([(0.0, 16, 20_000, 0)]),
    )
    for rank in (10, 50, 90):
        assert run.itl_s(rank) == pytest.approx(np.percentile(taken, rank), rel=0.02)


def test_what_is_cached_is_not_computed() -> None:
    run = simulate(fleet(0, 1), traffic([(0.0, 300, 1, 200)]))
    assert run.ttft_s[0] == pytest.approx(0.01 + 100 * 0.0005 + 100 * 250 * 5e-8)
    assert run.prefill_tokens.sum() == 100


def test_a_handover_delays_the_second_token_and_not_the_first() -> None:
    """The last chunk of 44 is written when the one before it has long been: its bytes and two round trips."""
    split, alone = (simulate(fleet(n, 1), traffic([(0.0, 300, 3, 0)])) for n in (1, 0))
    assert split.ttft_s[0] == pytest.approx(alone.ttft_s[0])
    handover_s = 44 * KV_NBYTES / 1e9 + 2 * 0.001
    assert split.second_s[0] - alone.second_s[0] == pytest.approx(handover_s)


def test_what_was_cached_is_written_too() -> None:
    costs = replace(COSTS, transfer_bytes_per_s=1e6)
    run = simulate(fleet(1, 1, costs), traffic([(0.0, 200, 2, 150)]))
    step_s = 0.01 + 0.001 + 201 * 1e-6
    assert run.second_s[0] - run.first_s[0] == pytest.approx(200 * KV_NBYTES / 1e6 + 2 * 0.001 + step_s)


@pytest.mark.parametrize("end", ["out", "in"])
def test_a_link_carries_one_thing_after_the_other(end: str) -> None:
    """Two prompts that are computed at once, on two workers or written to two: where they share a link, the second of them
    waits for the first."""
    costs = replace(COSTS, transfer_bytes_per_s=1e6)
    sharing, apart = ((2, 1), (2, 2)) if end == "in" else ((1, 2), (2, 2))
    asks = traffic([(0.0, 100, 2, 0), (0.0, 100, 2, 0)])
    late, early = (simulate(fleet(*shape, costs=costs), asks).second_s.max() for shape in (sharing, apart))
    assert late - early > 0.9 * 100 * KV_NBYTES / 1e6


def test_who_finds_no_room_waits_for_it() -> None:
    """Each prompt and answer takes 110 of 200 tokens."""
    asks = traffic([(0.0, 100, 10, 0), (0.0, 100, 10, 0)])
    for num_prefill in (0, 1):
        run = simulate(fleet(num_prefill, 1, kv_tokens=200), asks)
        assert run.first_s[1] > run.end_s[0]
        roomy = simulate(fleet(num_prefill, 1, kv_tokens=220), asks)
        assert roomy.first_s[1] < roomy.end_s[0]


def test_what_never_fits_is_never_answered_and_hinders_nobody() -> None:
    run = simulate(fleet(1, 1, kv_tokens=200), traffic([(0.0, 300, 10, 0), (0.1, 100, 10, 0)]))
    assert np.isinf(run.ttft_s[0])
    assert np.isinf(run.tpot_s[0])
    assert np.isfinite(run.end_s[1])


def test_more_experts_are_read_the_more_tokens_meet() -> None:
    """256 experts of which a token meets 8, in a second when all are read."""
    cost = StepCost(expert_s=1.0, expert_rate=-np.log1p(-8 / 256))
    one = simulate(Fleet(Pool(1, cost, 256, 10**6, 64)), traffic([(0.0, 1, 1, 0)])).ttft_s[0]
    many = simulate(Fleet(Pool(1, cost, 256, 10**6, 64)), traffic([(0.0, 200, 1, 0)])).ttft_s[0]
    assert one == pytest.approx(8 / 256)
    assert many == pytest.approx(1 - (1 - 8 / 256) ** 200)


@pytest.mark.parametrize("prompts_alone", [False, True])
def test_a_prompt_alone_is_one_long_gap_for_who_decodes(prompts_alone: bool) -> None:
    """The second request's 256 tokens arrive while the first decodes: computed beside its next token, or before it."""
    pool = Pool(1, calibrated(COSTS), 512, 64000, 64, prompts_alone)
    run = simulate(Fleet(pool), traffic([(0.0, 10, 20, 0), (0.1, 256, 1, 0)]), 0.1)
    prompt_s = 256 * 0.0005 + 256 * 128 * 5e-8
    longest_s = prompt_s + 0.01 + 0.001 + (0.01 if prompts_alone else 0.0)
    assert run.num_slow.tolist() == [1, 0]
    assert run.itl_s(100) == pytest.approx(longest_s, rel=0.03)
    alone = simulate(Fleet(pool), traffic([(0.0, 10, 20, 0)]))
    assert run.end_s[0] - alone.end_s[0] == pytest.approx(prompt_s + (0.01 if prompts_alone else 0.0))


def test_in_the_line_a_short_prompt_goes_before_a_long_one_that_has_not_waited_for_long() -> None:
    """Three of 1000 tokens, half a second each, the second of which waits, and the third; then short ones."""
    asks = [(0.0, 1000, 1, 0), (0.01, 1000, 1, 0), (0.02, 1000, 1, 0), (0.03, 20, 1, 0), (0.2, 20, 1, 0)]
    alone = Gateway(decode_computes=False)
    in_order, ours = (
        simulate(fleet(1, 1, gateway=gateway), traffic(asks)).first_s
        for gateway in (replace(alone, patience=0.0), alone)
    )
    assert list(np.argsort(in_order)) == [0, 1, 2, 3, 4]
    assert list(np.argsort(ours)) == [0, 3, 4, 1, 2]
    many = [(0.02 + 0.06 * n, 100, 1, 0) for n in range(100)]  # about as many as it computes
    late = simulate(fleet(1, 1, gateway=alone), traffic([(0.0, 1000, 1, 0), (0.01, 1000, 1, 0), *many])).ttft_s[1]
    assert late < 6 * 0.56, "it waits for 4 times what it takes itself, and the first"


def test_streams_keep_their_gaps_beside_prompts_that_queue() -> None:
    """Long prompts come faster than the prefill worker has turns for all at once: a decode worker that takes some makes
    its streams wait, unless what they lose weighs more than what the prompts do."""
    longs = [(0.5 + 0.5 * n, 1000, 2, 0) for n in range(40)]
    streams = [(float(n), 30, 60, 0) for n in range(20)]
    runs = [
        simulate(fleet(1, 1, gateway=Gateway(stall_weight=weight)), traffic(longs + streams), 0.1)
        for weight in (1.0, Gateway().stall_weight, 100.0)
    ]
    slow, ttft_s = [run.num_slow.sum() for run in runs], [run.ttft_s.mean() for run in runs]
    assert slow[0] > 2 * slow[1] > slow[2] == 0
    assert ttft_s == sorted(ttft_s)


@st.composite
def loads(draw: st.DrawFn) -> list[Ask]:
    asks = []
    for _ in range(draw(st.integers(1, 30))):
        num_input = draw(st.integers(1, 700))
        cached = draw(st.integers(0, num_input - 1))
        asks.append((draw(st.floats(0, 3)), num_input, draw(st.integers(1, 40)), cached))
    return asks


@settings(max_examples=60)
@given(
    loads(), st.integers(0, 3), st.integers(1, 3), st.sampled_from([800, 2000, 64000]), st.floats(0.005, 0.1),
    st.booleans(), st.sampled_from([AT_ONCE, Gateway(), Gateway(0.0), Gateway(dispatch_s=0.05)]),
)  # fmt: skip
def test_every_token_is_computed_once_and_every_gap_counted(
    asks: list[Ask],
    num_prefill: int,
    num_decode: int,
    kv_tokens: int,
    bound_s: float,
    prompts_alone: bool,
    gateway: Gateway,
) -> None:
    """``simulate`` itself raises where something is left."""
    load = traffic(asks)
    made = fleet(num_prefill, num_decode, kv_tokens=kv_tokens, gateway=gateway)
    made = replace(made, decode=replace(made.decode, prompts_alone=prompts_alone))
    run = simulate(made, load, bound_s)
    assert (run.first_s > load.arrive_s).all()
    assert (run.end_s >= run.first_s).all()
    assert run.prefill_tokens.sum() == (load.num_input - load.num_cached).sum()
    assert run.decode_tokens.sum() == run.gaps.sum() == (load.num_output - 1).sum()
    assert (run.num_slow <= load.num_output - 1).all()
    assert run.busy_s.max() <= run.end_of_all_s + 1e-9
    if num_prefill:
        assert run.decode_tokens[:num_prefill].sum() == 0
        assert run.prefill_tokens[num_prefill:].sum() == 0 or gateway.decode_computes
    # The bounds of the bucket in which the bound lies.
    slow = int(np.log(bound_s / 1e-5) / np.log(1.02))
    assert run.gaps[slow + 1 :].sum() <= run.num_slow.sum() <= run.gaps[slow:].sum()
    everything = simulate(made, load, 0.0)
    assert (everything.num_slow == load.num_output - 1).all()


def poisson(count: int, rate: float) -> list[Ask]:
    drawn = random.Random(1)
    at_s, asks = 0.0, []
    for _ in range(count):
        at_s += drawn.expovariate(rate)
        asks.append((at_s, max(2, int(drawn.lognormvariate(5.7, 0.6))), max(2, int(drawn.lognormvariate(3.5, 0.6))), 0))
    return asks


@pytest.mark.parametrize(
    ("shape", "rate", "dispatch_s"), [((0, 2), 2.0, 0.0), ((1, 1), 1.5, 0.0), ((2, 1), 3.0, 0.0), ((1, 1), 1.5, 0.05)]
)
def test_as_the_fine_simulator(shape: tuple[int, int], rate: float, dispatch_s: float) -> None:
    """The real schedulers and pools, routed to whoever has least to do: within 5 % at the median, 10 % at p90."""
    asks = poisson(150, rate)
    limits = Limits(block_size=16, context_length=8192, max_waiting=1000)
    roles = [Role.PREFILL] * shape[0] + [Role.DECODE] * shape[1]
    specs = [WorkerSpec(f"w{n}", role, 4000, 16 * KV_NBYTES, limits) for n, role in enumerate(roles)]
    words = random.Random(0)
    arrivals = [
        Arrival(f"r{n}", at_s, tuple(words.randrange(60000) for _ in range(prompt)), answer)
        for n, (at_s, prompt, answer, _) in enumerate(asks)
    ]
    fine = Cluster(specs, COSTS, Policy.KV_AWARE, ViewDelays(0.0, 0.0, dispatch_s)).run(arrivals)
    coarse: Run = simulate(fleet(*shape, gateway=Gateway(dispatch_s=dispatch_s)), traffic(asks))
    for ours, theirs in ((coarse.ttft_s, [s.ttft_s for s in fine]), (coarse.tpot_s, [s.itl_s for s in fine])):
        for rank, bound in ((50, 0.05), (90, 0.1)):
            assert np.percentile(ours, rank) == pytest.approx(np.percentile(theirs, rank), rel=bound)
