"""A cluster in virtual time: the same seed the same run, nothing lost, and policies told apart."""

from __future__ import annotations

from functools import partial

import pytest

from gateway.admission import Objectives
from gateway.candidates import Role
from gateway.routing import Policy
from services.engine.hashing import extend_chain
from services.engine.scheduler import Limits
from services.planner.simulator.arrivals import Arrival, Served
from services.planner.simulator.cluster import IN_LINE, ByPolicy, Cluster, ViewDelays
from services.planner.simulator.cost_model import CostModel
from services.planner.simulator.worker import ROOT, WorkerSpec
from services.worker.pulls import MAX_PULLS
from tests.bench.routing.loads import Chats, SystemPrompts
from tests.bench.routing.oracle import Oracle

COSTS = CostModel(0.01, 0.001, 1e-7, 0.002, 1e-6, 0.001, 1e9)
CHATS = Chats(num_chats=8, num_turns=3, first_tokens=150, output_tokens=8)
SHAPES = [(2, 2), (0, 4)]


def cluster(
    policy: Policy | Oracle, shape: tuple[int, int], num_blocks: int = 400, objectives: Objectives | None = IN_LINE,
    delays: ViewDelays | None = None,
) -> Cluster:  # fmt: skip
    roles = [Role.PREFILL] * shape[0] + [Role.DECODE] * shape[1]
    limits = Limits(block_size=16, context_length=4096)
    specs = [WorkerSpec(f"w{n}", r, num_blocks, 300_000, limits) for n, r in enumerate(roles)]
    return Cluster(specs, COSTS, policy, delays, objectives)


def hit_rate(served: list[Served]) -> float:
    return sum(s.num_cached for s in served) / sum(s.num_prompt for s in served)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("num_blocks", [60, 400])
def test_every_request_is_answered_once_and_nothing_stays(
    policy: Policy, shape: tuple[int, int], num_blocks: int
) -> None:
    """With 60 blocks a worker preempts, evicts and turns away."""
    simulated = cluster(policy, shape, num_blocks)
    served = simulated.run(CHATS.arrivals(4.0, seed=1))
    simulated.check_integrity()
    assert sorted(s.id for s in served) == sorted(f"c{c}t{t}" for c in range(8) for t in range(3))
    assert all(s.arrived_s < s.first_s <= s.ended_s for s in served)


def test_a_seed_gives_a_run() -> None:
    one, same, other = (cluster(Policy.KV_AWARE, (2, 2)).run(CHATS.arrivals(4.0, seed)) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("shape", SHAPES)
def test_who_looks_at_prefixes_finds_more(shape: tuple[int, int]) -> None:
    load = SystemPrompts(num_requests=60, num_prompts=20, prompt_tokens=400, output_tokens=4)
    aware, blind = (
        hit_rate(cluster(policy, shape, 120).run(load.arrivals(2.0, seed=3)))
        for policy in (Policy.KV_AWARE, Policy.ROUND_ROBIN)
    )
    assert aware > 1.2 * blind


def test_a_request_alone_takes_what_its_steps_take() -> None:
    """A step of 256 prompt tokens, one of 44, and 2 of decoding."""
    (served,) = cluster(Policy.KV_AWARE, (0, 4)).run([Arrival("a", 1.0, tuple(range(300)), 3)])
    prefill_s = 2 * 0.01 + 300 * 0.001 + (256 * 128 + 44 * (256 + 22)) * 1e-7
    assert served.ttft_s == pytest.approx(prefill_s)
    assert served.ended_s - served.first_s == pytest.approx(2 * (0.01 + 0.002) + (301 + 302) * 1e-6)


def test_whoever_computed_the_prompt_tells_the_first_token_before_the_others_move() -> None:
    """A step of 256 prompt tokens and one of 44; then two messages and back and the last chunk's bytes, and 2 steps."""
    (served,) = cluster(Policy.ROUND_ROBIN, (1, 1)).run([Arrival("a", 1.0, tuple(range(300)), 3)])
    prefill_s = 2 * 0.01 + 300 * 0.001 + (256 * 128 + 44 * (256 + 22)) * 1e-7
    assert served.ttft_s == pytest.approx(prefill_s)
    handover_s = 2 * 0.001 + 16 * 300_000 / 1e9
    assert served.token_at_s[1] - served.first_s == pytest.approx(handover_s + 0.01 + 0.002 + 301e-6)
    assert served.token_at_s == [served.first_s, served.token_at_s[1], served.ended_s]


@pytest.mark.parametrize("shape", [(0, 1), (1, 1)])
def test_a_request_is_on_its_way_to_its_worker_for_so_long(shape: tuple[int, int]) -> None:
    load = [Arrival("a", 1.0, tuple(range(300)), 3), Arrival("b", 9.0, tuple(range(500, 800)), 3)]
    at_once, sent = (
        cluster(Policy.ROUND_ROBIN, shape, delays=ViewDelays(dispatch_s=dispatch_s)).run(load)
        for dispatch_s in (0, 0.25)
    )
    for one, other in zip(at_once, sent, strict=True):
        assert other.ttft_s == pytest.approx(one.ttft_s + 0.25)
        assert other.ended_s - other.first_s == pytest.approx(one.ended_s - one.first_s)


def test_a_worker_keeps_its_role_while_a_prompt_is_on_its_way_to_it() -> None:
    simulated = cluster(Policy.ROUND_ROBIN, (1, 1), delays=ViewDelays(dispatch_s=0.25))
    changed_s: list[float] = []
    change = partial(
        simulated.change_role, simulated.workers[0], Role.DECODE, lambda: changed_s.append(simulated.queue.now_s)
    )
    simulated.queue.at(1.1, change)
    (served,) = simulated.run([Arrival("a", 1.0, tuple(range(300)), 3)])
    simulated.check_integrity()
    assert changed_s
    assert changed_s[0] > served.first_s


def test_where_gaps_are_promised_a_first_token_is_told_when_its_answer_goes_on() -> None:
    load = [Arrival("a", 1.0, tuple(range(300)), 3)]
    (at_once,), (held,) = (
        cluster(Policy.ROUND_ROBIN, (1, 1), objectives=objectives).run(load)
        for objectives in (Objectives(), Objectives(itl_s=9.0))
    )
    handover_s = 2 * 0.001 + 16 * 300_000 / 1e9
    assert held.first_s - at_once.first_s == pytest.approx(handover_s)
    assert held.token_at_s[1:] == at_once.token_at_s[1:]
    assert held.token_at_s[1] - held.first_s == pytest.approx(0.01 + 0.002 + 301e-6)
    only_one = [Arrival("a", 1.0, tuple(range(300)), 1)]
    (alone,) = cluster(Policy.ROUND_ROBIN, (1, 1), objectives=Objectives(itl_s=9.0)).run(only_one)
    assert alone.ttft_s == pytest.approx(at_once.ttft_s), "no gap follows it"


def test_a_prompt_that_comes_again_goes_where_it_is_cached() -> None:
    load = [Arrival(f"{n}", 10.0 * n, tuple(range(1000)), 2) for n in range(8)]
    assert [s.num_cached for s in cluster(Policy.KV_AWARE, (0, 4)).run(load)] == [0, *[992] * 7]


@pytest.mark.parametrize(("shape", "num_waiting", "first"), [((2, 2), 3, "20.5"), ((0, 4), 2, "20.4")])
def test_what_workers_have_no_room_for_waits_in_the_line(shape: tuple[int, int], num_waiting: int, first: str) -> None:
    """A prompt takes a millisecond a token, as all have measured on the first of these, so that none waits behind another
    on a worker; the shortest of the line goes where the shortest has come to its end."""
    words = iter(range(100_000))
    load = [
        Arrival(f"{at_s:g}.{n}", at_s + n / 1000, tuple(next(words) for _ in range(size)), 2)
        for at_s, sizes in ((0.0, [900] * 8), (20.0, [300, 900, 900, 900, 200, 200]))
        for n, size in enumerate(sizes)
    ]
    simulated = cluster(Policy.KV_AWARE, shape)
    waiting: list[int] = []
    simulated.queue.at(20.1, lambda: waiting.append(len(simulated._line)))
    served = {s.id: s for s in simulated.run(load)}
    simulated.check_integrity()
    assert waiting == [num_waiting]
    assert served[first].first_s - served["20.0"].first_s == pytest.approx(200 * COSTS.prefill_token_s, rel=0.5)
    if shape[0]:
        assert served[first].first_s < served["20.2"].first_s, "which came before"


def test_who_comes_to_the_head_of_the_line_need_not_wait_for_a_worker_to_report() -> None:
    """A short prompt behind a long one, which waits for another long one: the decode worker takes it at once."""
    words = iter(range(100_000))
    load = [
        Arrival(f"{at_s:g}", at_s, tuple(next(words) for _ in range(size)), 2)
        for at_s, size in ((0.0, 900), (20.0, 900), (20.1, 900), (20.2, 20))
    ]
    served = {s.id: s for s in cluster(Policy.KV_AWARE, (1, 1)).run(load)}
    assert served["20.1"].first_s > 21.8, "it waits for the first"
    assert served["20.2"].ttft_s == pytest.approx(0.01 + 20 * 0.001 + 20 * 10 * 1e-7)


@pytest.mark.parametrize(("host", "cached"), [("one", [0, 0, 992, 992]), ("", [0, 0, 0, 992])])
def test_a_prefix_is_read_from_a_busy_worker_of_the_same_host(host: str, cached: list[int]) -> None:
    """The first has the prompt and computes another; the second, which is idle, reads the prompt's blocks from it: two
    calls and 62 blocks at 1 GB/s, then a step for the last 8 tokens."""
    limits = Limits(block_size=16, context_length=4096, max_pinned=100)
    specs = [WorkerSpec(f"w{n}", Role.DECODE, 400, 300_000, limits, host) for n in range(2)]
    simulated = Cluster(specs, COSTS, Policy.KV_AWARE)
    prompt, other = tuple(range(1000)), tuple(range(5000, 7000))
    load = [Arrival("a", 0.0, prompt, 2), Arrival("b", 10.0, other, 2), Arrival("c", 10.1, prompt, 2),
            Arrival("d", 20.0, prompt, 2)]  # fmt: skip
    served = {s.id: s for s in simulated.run(load)}
    simulated.check_integrity()
    assert [served[id_].num_cached for id_ in "abcd"] == cached
    if host:
        assert served["c"].ttft_s == pytest.approx(
            2 * 0.001 + 62 * 300_000 / 1e9 + 0.01 + 8 * 0.001 + 8 * 996 * 1e-7, abs=1e-6
        )


def test_who_asks_for_blocks_on_their_way_waits_for_them() -> None:
    limits = Limits(block_size=16, context_length=4096, max_pinned=100)
    specs = [WorkerSpec(f"w{n}", Role.DECODE, 400, 300_000, limits, "one") for n in range(2)]
    simulated = Cluster(specs, COSTS, Policy.KV_AWARE, ViewDelays(report_every_s=0.001))
    holder, puller = simulated.workers
    chain = extend_chain(ROOT, tuple(range(160)), 16)
    (served,) = simulated.run([Arrival("a", 0.0, tuple(range(160)), 2)])
    assert served.num_cached == 0
    came: list[tuple[str, float]] = []
    for name in ("first", "second"):
        simulated._pulling.pull(puller, holder, chain, lambda name=name: came.append((name, simulated.queue.now_s)))  # type: ignore[misc]
    assert (puller.pulls.num_pulls, holder.pins.num_pins) == (1, 1)
    began_s = simulated.queue.now_s
    simulated._touch(holder)
    changed_s: list[float] = []
    simulated.change_role(puller, Role.PREFILL, lambda: changed_s.append(simulated.queue.now_s))
    assert changed_s == [], "not while it pulls"
    simulated.queue.run()
    assert simulated._seen[holder.key].load.num_pinnable_blocks == 100, "the gateway hears that the pin has ended"
    took_s = COSTS.transfer_s(10 * 300_000)
    assert came == [("first", began_s + took_s), ("second", began_s + took_s)]
    assert len(puller.scheduler.pool.match(chain)) == 10
    simulated.check_integrity()
    simulated._pulling.pull(puller, holder, chain, lambda: came.append(("at once", simulated.queue.now_s)))
    assert came[-1] == ("at once", simulated.queue.now_s), "nothing is lacking"
    gone = extend_chain(ROOT, tuple(range(500, 660)), 16)
    simulated._pulling.pull(puller, holder, gone, lambda: came.append(("gone", simulated.queue.now_s)))
    assert came[-1] == ("gone", simulated.queue.now_s)
    simulated.check_integrity()


def test_who_finds_a_prefill_worker_full_comes_again_and_its_blocks_are_given_back() -> None:
    limits = Limits(block_size=16, context_length=4096, max_running=1, max_waiting=1)
    specs = [WorkerSpec("p", Role.PREFILL, 400, 300_000, limits), WorkerSpec("d", Role.DECODE, 400, 300_000, limits)]
    always_split = ByPolicy(Policy.KV_AWARE, stall_weight=1e9)
    simulated = Cluster(specs, COSTS, always_split, objectives=None)
    served = simulated.run([Arrival(f"{n}", 0.01 * n, tuple(range(1000 * n, 1000 * n + 400)), 4) for n in range(6)])
    simulated.check_integrity()
    assert len(served) == 6
    assert sum(s.num_retries for s in served) > 0


def test_nothing_is_pulled_where_there_is_no_room_or_too_much_is_on_its_way() -> None:
    limits = Limits(block_size=16, context_length=4096, max_pinned=100)
    specs = [WorkerSpec(f"w{n}", Role.DECODE, 400, 300_000, limits, "one") for n in range(2)]
    simulated = Cluster(specs, COSTS, Policy.KV_AWARE)
    holder, puller = simulated.workers
    prompts = [tuple(range(1000 * n, 1000 * n + 32)) for n in range(MAX_PULLS + 1)]
    simulated.run([Arrival(f"{n}", float(n), prompt, 1) for n, prompt in enumerate(prompts)])
    came: list[int] = []
    taken = puller.scheduler.pool.allocate(400)
    simulated._pulling.pull(puller, holder, extend_chain(ROOT, prompts[0], 16), lambda: came.append(-1))
    assert came == [-1], "no room"
    for block in taken:
        puller.scheduler.pool.remember(block, b"%16d" % block)
    puller.scheduler.pool.release(taken)
    puller.wake()
    for n, prompt in enumerate(prompts):
        simulated._pulling.pull(puller, holder, extend_chain(ROOT, prompt, 16), lambda n=n: came.append(n))  # type: ignore[misc]
    assert (came, puller.pulls.num_pulls) == ([-1, MAX_PULLS], MAX_PULLS)
    assert puller.scheduler.take_cache_changes() == [], "what made room is told at once"
    simulated.queue.run()
    assert came == [-1, MAX_PULLS, *range(MAX_PULLS)]
    simulated.check_integrity()


def test_a_cache_that_is_not_seen_yet_draws_nobody() -> None:
    """The other prompt keeps its worker busy, and the view of the cache comes before the third request or after it."""
    load = [Arrival("a", 0.0, tuple(range(1000)), 2), Arrival("b", 3.0, tuple(range(5000, 5400)), 2),
            Arrival("c", 3.001, tuple(range(1000)), 2)]  # fmt: skip
    limits = Limits(block_size=16, context_length=4096)
    specs = [WorkerSpec(f"w{n}", Role.DECODE, 400, 300_000, limits) for n in range(2)]
    cached = {}
    for events_s in (0.01, 100.0):
        simulated = Cluster(specs, COSTS, Policy.KV_AWARE, ViewDelays(events_s=events_s))
        cached[events_s] = {s.id: s.num_cached for s in simulated.run(load)}["c"]
    assert cached == {0.01: 992, 100.0: 0}


def test_who_knows_the_future_waits_less() -> None:
    load = SystemPrompts(num_requests=14, num_prompts=4, output_tokens=8)
    oracle = Oracle(lambda served: served.ttft_s, horizon_s=4.0)
    knowing = cluster(oracle, (1, 2), objectives=None)
    served = oracle.run(knowing, load.arrivals(4.0, seed=3))
    knowing.check_integrity()
    usual = cluster(Policy.KV_AWARE, (1, 2), objectives=None).run(load.arrivals(4.0, seed=3))
    assert sorted(s.id for s in served) == sorted(s.id for s in usual)
    assert sum(s.ttft_s for s in served) < sum(s.ttft_s for s in usual)
