"""Who gets a request, and why."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission import Objectives
from gateway.apart import Pair
from gateway.candidates import Abilities, Candidate, Path, Rates, Role, TransferRate, WorkerKey
from gateway.costs import STALL_WEIGHT, Costs, Demand
from gateway.pairing import Partners, why_not_pair
from gateway.routing import NoWorkerError, PassedOver, Policy, Route, choose_route
from services.runtime.place import Distance, Place
from services.runtime.protocol import SPOKEN, Protocol

RATES = Rates(
    prefill_tokens_per_s=1000.0, step_base_s=0.02, step_per_sequence_s=0.002, transfer_bytes_per_s=1e9,
    transfer_round_trip_s=0.001, host_load_bytes_per_s=5e9, pull_bytes_per_s=2e9, pull_overhead_s=0.004,
)  # fmt: skip


def worker(name: str, role: Role, **changes: object) -> Candidate:
    base = Candidate(
        key=WorkerKey(name, 1), role=role, address="a:1", content_fingerprint="f", block_size=16,
        block_nbytes=500_000, num_requests=0, num_queued_prefill_tokens=0, num_free_blocks=1000, num_prefix_blocks=0,
        rates=RATES,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


P0, P1 = worker("p0", Role.PREFILL), worker("p1", Role.PREFILL)
D0, D1 = worker("d0", Role.DECODE), worker("d1", Role.DECODE)


def route(
    candidates: Sequence[Candidate], num_tokens: int = 500, excluded: tuple[Candidate, ...] = (),
    policy: Policy = Policy.KV_AWARE, turn: int = 0, request_id: str = "r", spoken: Protocol = SPOKEN,
    apart: Set[Pair] = frozenset(), stall_weight: float = STALL_WEIGHT,
) -> Route:  # fmt: skip
    chosen = choose_route(
        candidates, Demand(num_tokens, 1000), frozenset(c.key for c in excluded), policy=policy, min_ship_tokens=32,
        turn=turn, request_id=request_id, spoken=spoken, apart=apart, stall_weight=stall_weight,
    )  # fmt: skip
    assert chosen.chosen in chosen.options
    assert chosen.decode.key.worker_id in chosen.reason
    return chosen


def names(*args: object, **kwargs: object) -> tuple[str, str | None]:
    found = route(*args, **kwargs)  # type: ignore[arg-type]
    return found.decode.key.worker_id, found.prefill.key.worker_id if found.prefill else None


def test_the_least_loaded_decode_worker_is_taken() -> None:
    assert names([P0, replace(D0, num_requests=3), D1]) == ("d1", "p0")


def test_among_equals_the_one_that_holds_the_prefix() -> None:
    assert names([P0, D0, replace(D1, num_prefix_blocks=4)]) == ("d1", "p0")


def test_a_full_pool_comes_last() -> None:
    assert names([P0, replace(D0, num_free_blocks=3), replace(D1, num_requests=9)]) == ("d1", "p0")


def test_who_has_seen_steps_of_one_size_alone_does_not_get_all_that_comes() -> None:
    """Its time of a step is known, and is the least here; what one sequence more would add is not."""
    flat = replace(RATES, step_base_s=0.019, step_per_sequence_s=0.0)
    went = [names([P0, replace(D0, rates=flat, num_requests=n), replace(D1, num_requests=1)])[0] for n in (0, 8)]
    assert went == ["d0", "d1"], "a sequence more is taken to add what it adds elsewhere"
    nobody_knows = [replace(each, rates=flat) for each in (D0, D1)]
    terms = [route([P0, replace(each, num_requests=n)]).chosen.terms for n, each in enumerate(nobody_knows)]
    assert terms[0].decode_s == pytest.approx(64 * 0.019), "of one sequence, as it was measured"
    assert terms[1].decode_s > terms[0].decode_s


def test_the_prefill_worker_that_is_done_first() -> None:
    busy = replace(P0, num_queued_prefill_tokens=4000)
    slow = replace(P1, rates=replace(RATES, prefill_tokens_per_s=400.0))
    others = replace(D0, num_requests=8)  # whom computing there would stall
    assert names([busy, slow, others]) == ("d0", "p1")
    assert names([replace(busy, num_queued_prefill_tokens=100), slow, others]) == ("d0", "p0")


def test_shipping_is_what_it_costs() -> None:
    """20 ms of compute against 2 ms of round trips and 1 ms of bytes; on a slow link, against 100 ms of bytes."""
    assert names([P0, D0], num_tokens=20) == ("d0", "p0")
    slow = replace(P0, rates=replace(RATES, transfer_bytes_per_s=1e7))
    assert names([slow, D0], num_tokens=20) == ("d0", None)
    assert names([P0, D0], num_tokens=1) == ("d0", None)
    assert names([P0, replace(D0, num_prefix_blocks=31)], num_tokens=500) == ("d0", None)


def test_a_busy_decode_worker_is_spared() -> None:
    queued = replace(P0, num_queued_prefill_tokens=1000)
    assert names([queued, D0], num_tokens=200) == ("d0", None)
    assert names([queued, replace(D0, num_requests=8)], num_tokens=200) == ("d0", "p0")


def test_what_streams_lose_weighs_more_where_a_prefill_worker_could_spare_them() -> None:
    """A second for its turn, against 0.2 s that one other stream would lose: 5 of them are worth a second of waiting."""
    queued, others = replace(P0, num_queued_prefill_tokens=900), replace(D0, num_requests=1)
    assert names([queued, others], num_tokens=200) == ("d0", "p0")
    assert names([queued, others], num_tokens=200, stall_weight=1.0) == ("d0", None)
    assert names([queued, D0], num_tokens=200) == ("d0", None), "who has nothing to do helps out"
    two = replace(D0, num_requests=2)
    for view in ([two], [two, replace(P0, content_fingerprint="g")]):
        assert route(view, stall_weight=100.0).chosen.terms.stall_s == pytest.approx(2 * 0.5), "where none could"


def test_among_workers_that_do_both_who_has_nothing_to_do_stalls_nobody() -> None:
    """Though it has measured itself a little slower than the one with a stream."""
    slow = replace(D1, rates=replace(RATES, prefill_tokens_per_s=800.0))
    found = route([replace(D0, num_requests=1), slow])
    assert found.decode == slow
    assert found.chosen.terms.stall_s == 0
    assert route([P0, replace(D0, num_requests=1)]).options[-1].terms.stall_s == pytest.approx(STALL_WEIGHT * 0.5)
    assert route([P0, D0]).options[-1].terms.stall_s == pytest.approx(0.5), "where others could compute it"


def test_who_could_compute_the_prompt_itself_is_among_the_options_also_where_shipping_is_better() -> None:
    """The second decode worker has most of it: not the best, and what is left when the prefill worker has no room."""
    queued = replace(P0, num_queued_prefill_tokens=1000)
    busy, busier = replace(D0, num_requests=3), replace(D1, num_requests=4, num_prefix_blocks=24)
    found = route([queued, busy, busier])
    assert (found.decode, found.prefill) == (busy, queued)
    with_room = Objectives().with_room(found, 99)
    assert with_room is not None
    assert (with_room.decode, with_room.prefill) == (busier, None)


def test_the_terms_add_up() -> None:
    found = route([replace(P0, num_queued_prefill_tokens=250, num_prefix_blocks=2), replace(D0, num_prefix_blocks=1)])
    terms = found.chosen.terms
    assert (terms.queue_s, terms.stall_s) == (0.25, 0.0)
    assert terms.prefill_s == pytest.approx((500 - 32) / 1000)
    assert terms.ship_s == pytest.approx(2 * 0.001 + 31 * 500_000 / 1e9)
    assert terms.decode_s == pytest.approx(64 * (0.02 + 0.002))
    assert terms.total_s == pytest.approx(terms.queue_s + terms.prefill_s + terms.ship_s + terms.decode_s)
    alone = next(option for option in found.options if option.prefill is None)
    assert alone.terms.prefill_s == alone.terms.stall_s == pytest.approx((500 - 16) / 1000)
    assert terms.evict_s == alone.terms.evict_s == 0.0, "nothing is pulled"
    assert str(alone) == "d0 0.0+0.0+484.0+0.0+484.0+0.0+1408.0=2376.0ms"


def test_a_hit_on_the_host_costs_a_copy_and_room() -> None:
    on_host = {"num_prefix_blocks": 20, "num_prefix_host_blocks": 12}
    found = route([replace(P0, **on_host), replace(D0, **on_host)])  # type: ignore[arg-type]
    split, alone = sorted(found.options, key=lambda option: option.prefill is None)
    for option in (split, alone):
        assert option.terms.prefill_s == pytest.approx((500 - 320) / 1000 + 12 * 500_000 / 5e9)
    assert split.terms.ship_s == pytest.approx(2 * 0.001 + 12 * 500_000 / 1e9)
    assert names([replace(P0, **on_host), replace(P1, num_prefix_blocks=20), D0]) == ("d0", "p1")  # type: ignore[arg-type]
    assert names([P0, replace(P1, **on_host), D0]) == ("d0", "p1")  # type: ignore[arg-type]
    assert route([D0, replace(D1, num_free_blocks=23, **on_host)]).decode.key.worker_id == "d0"  # type: ignore[arg-type]
    assert route([D0, replace(D1, num_free_blocks=24, **on_host)]).decode.key.worker_id == "d1"  # type: ignore[arg-type]


def test_who_has_not_measured_is_taken_for_typical() -> None:
    new = replace(P1, rates=Rates())
    for speed in (10.0, 1e6):
        measured = replace(P0, rates=replace(RATES, prefill_tokens_per_s=speed))
        found = route([measured, new, D0])
        a, b = (next(o for o in found.options if o.prefill is p).terms for p in (measured, new))
        assert a.prefill_s == b.prefill_s
    nobody = [replace(c, rates=Rates(prefill_tokens_per_s=float("nan"))) for c in (P0, D0)]
    assert names(nobody) == ("d0", "p0")


def test_unequal_content_is_never_paired() -> None:
    assert names([replace(P0, content_fingerprint="other"), P1, D0]) == ("d0", "p1")
    found = route([replace(P0, content_fingerprint="other"), D0])
    assert found.prefill is None
    assert [(p.worker_id, p.why) for p in found.passed_over] == [("p0", "its KV does not fit d0")]


TCP, RDMA, HERE_MEMORY = Path("tcp", ""), Path("RDMA", "InfiniBand"), Path("shared memory", "here")


def speaking(candidate: Candidate, oldest: int, newest: int) -> Candidate:
    return replace(candidate, abilities=replace(candidate.abilities, protocol=Protocol(oldest, newest)))


def reached_by(candidate: Candidate, *paths: Path) -> Candidate:
    return replace(candidate, abilities=replace(candidate.abilities, paths=frozenset(paths)))


def why(found: Route) -> dict[str, str]:
    return {p.worker_id: p.why for p in found.passed_over}


def test_workers_of_protocols_that_do_not_overlap_are_never_paired() -> None:
    old, both, new = speaking(P0, 1, 1), speaking(P1, 1, 2), speaking(worker("p2", Role.PREFILL), 3, 3)
    spoken = Protocol(1, 3)
    found = route([old, both, new, speaking(D0, 1, 1)], spoken=spoken)
    assert {o.prefill.key.worker_id for o in found.options if o.prefill} == {"p0", "p1"}
    assert why(found) == {"p2": "it speaks protocol 3, d0 1"}
    found = route([old, both, new, speaking(D0, 2, 3)], spoken=spoken)
    assert {o.prefill.key.worker_id for o in found.options if o.prefill} == {"p1", "p2"}
    assert why(found) == {"p0": "it speaks protocol 1, d0 2 to 3"}


def test_a_gateway_passes_over_workers_whose_protocol_it_does_not_speak() -> None:
    old, new = speaking(D0, 1, 1), speaking(D1, 3, 3)
    found = route([P0, replace(old, num_requests=50), new], spoken=Protocol(1, 2))
    assert found.decode.key == D0.key
    assert why(found) == {"d1": "speaks protocol 3, this gateway 1 to 2"}
    with pytest.raises(NoWorkerError, match=r"1 known, all failed it, are draining or speak another protocol") as error:
        route([P0, new], spoken=Protocol(1, 2))
    assert [p.worker_id for p in error.value.passed_over] == ["d1"]
    assert route([P0, speaking(D1, 2, 9)], spoken=Protocol(1, 2)).decode.key == D1.key


def test_workers_without_a_common_path_are_never_paired() -> None:
    here, apart = reached_by(P0, HERE_MEMORY, RDMA), reached_by(P1, TCP)
    assert route([here, apart, reached_by(D0, HERE_MEMORY)]).prefill == here
    found = route([here, apart, reached_by(D0, replace_scope(HERE_MEMORY, "there"), TCP)])
    assert found.prefill == apart
    assert why(found) == {
        "p0": "no path leads from it to d0: it has RDMA (InfiniBand) and shared memory (here), the other "
        "shared memory (there) and tcp"
    }
    assert route([reached_by(P0, replace_scope(RDMA, "Ethernet")), reached_by(D0, RDMA)]).prefill is None


def test_workers_that_say_nothing_of_it_are_of_the_first_protocol_and_take_any_path() -> None:
    assert P0.abilities == Abilities(Protocol(1, 1), None)
    for decode in (reached_by(D0, RDMA), reached_by(speaking(D0, 1, 7), TCP), D0):
        assert route([P0, decode]).prefill == P0
    assert route([P0, speaking(D0, 2, 2)], spoken=Protocol(1, 2)).prefill is None


def test_partners_of_several_kinds_are_in_the_order_of_their_ids() -> None:
    mixed = [P0, speaking(P1, 1, 2), worker("p2", Role.PREFILL)]
    assert list(Partners(mixed).of(D0)) == mixed
    assert list(Partners([*mixed, speaking(worker("p3", Role.PREFILL), 2, 2)]).of(D0)) == mixed


def test_a_pair_that_is_apart_is_not_made_and_the_reason_is_told() -> None:
    apart = {(P0.key, D0.key)}
    assert route([P0, D0], apart=apart).prefill is None
    assert route([P0, D0], apart=apart).passed_over == (PassedOver("p0", "could not reach d0 a moment ago"),)
    assert route([P0, P1, D0], apart=apart).prefill == P1
    assert route([P0, D0]).prefill == P0


def test_a_near_owner_is_preferred_by_what_was_measured_at_that_distance() -> None:
    """Of 500 kB blocks 32: 8 ms at 2 GB/s, 1.6 s at 10 MB/s."""
    rates = (TransferRate(Distance.RACK, 2e9, 0.001), TransferRate(Distance.ZONE, 1e7, 0.02))
    writer = replace(P0, place=Place("h0", "r0", "a"), transfer_rates=rates)
    near = replace(D0, place=Place("h1", "r0", "a"), num_requests=4)
    far = replace(D1, place=Place("h2", "r1", "a"), num_requests=3)
    found = route([writer, near, far])
    assert (found.decode, found.prefill) == (near, writer)
    assert found.chosen.terms.ship_s == pytest.approx(2 * 0.001 + 32 * 500_000 / 2e9)
    costs = Costs([writer, near, far], Demand(500, 1000))
    assert costs.split(far, writer).terms.ship_s == pytest.approx(2 * 0.02 + 32 * 500_000 / 1e7)
    assert names([replace(writer, transfer_rates=()), near, far]) == ("d1", "p0"), "where nobody knows better"


def test_what_a_writer_has_not_measured_of_a_distance_others_have() -> None:
    rates = (TransferRate(Distance.ZONE, 4e7, 0.02),)
    knows = replace(P0, place=Place("h0", "r0", "a"), transfer_rates=rates)
    new = replace(P1, place=Place("h1", "r1", "a"))
    here, there = replace(D0, place=Place("h1", "r1", "a")), replace(D1, place=Place("h2", "r2", "a"))
    costs = Costs([knows, new, here, there], Demand(500, 1000))
    assert costs.split(there, new).terms.ship_s == pytest.approx(2 * 0.02 + 32 * 500_000 / 4e7)
    # Of its own host nobody has measured anything: what it measured of all.
    assert costs.split(here, new).terms.ship_s == pytest.approx(2 * 0.001 + 32 * 500_000 / 1e9)
    broken = replace(knows, transfer_rates=(TransferRate(Distance.ZONE, float("nan"), 0.0),))
    assert Costs([broken, there], Demand(500, 1000)).split(there, broken).terms.ship_s == pytest.approx(
        2 * 0.001 + 32 * 500_000 / 1e9
    )


def test_no_prefix_is_pulled_between_protocols_that_do_not_overlap() -> None:
    spoken = Protocol(1, 3)
    busy, idle = speaking(holding(D0, 125, num_requests=40), 3, 3), holding(D1, 0)
    found = route([busy, idle], num_tokens=2048, spoken=spoken)
    assert (found.decode.key, found.chosen.pull) == (D1.key, None)
    assert found.pull_reason == "does not pull from d0: it speaks protocol 3, the other 1"
    second = holding(worker("d2", Role.DECODE), 100, num_requests=40)
    found = route([busy, second, idle], num_tokens=2048, spoken=spoken)
    assert found.chosen.pull is not None
    assert found.chosen.pull.holder == second


def replace_scope(path: Path, scope: str) -> Path:
    return path._replace(scope=scope)


def test_unequal_block_sizes_are_counted_each_in_its_own() -> None:
    cached = {"num_prefix_blocks": 10}
    assert names([replace(P0, **cached), replace(P1, block_size=32, **cached), D0]) == ("d0", "p1")  # type: ignore[arg-type]
    # 15 blocks of 32 tokens leave 20 of the prompt, 15 of 16 leave 260.
    least = {"policy": Policy.LEAST_LOADED}
    assert names([P0, replace(D0, block_size=32, num_prefix_blocks=15)], **least) == ("d0", None)
    assert names([P0, replace(D0, num_prefix_blocks=15)], **least) == ("d0", "p0")


def test_failed_and_draining_workers_are_left_out() -> None:
    assert names([P0, P1, D0], excluded=(P0,)) == ("d0", "p1")
    assert names([P0, D0], excluded=(P0,)) == ("d0", None)
    assert names([P0, replace(D0, draining=True), D1]) == ("d1", "p0")
    with pytest.raises(NoWorkerError, match="1 known") as error:
        names([P0, D0], excluded=(D0,))
    assert [(p.worker_id, p.why) for p in error.value.passed_over] == [("d0", "failed this request")]
    with pytest.raises(NoWorkerError, match="has joined"):
        names([P0])


def test_a_new_incarnation_is_another_worker() -> None:
    assert names([P0, replace(D0, key=WorkerKey("d0", 2))], excluded=(D0,)) == ("d0", "p0")


def test_the_other_policies_look_at_no_cache() -> None:
    view = [P0, replace(P1, num_queued_prefill_tokens=9), D0, replace(D1, num_prefix_blocks=20)]
    assert names(view, policy=Policy.LEAST_LOADED) == ("d0", "p0")
    turns = [names(view, policy=Policy.ROUND_ROBIN, turn=turn) for turn in range(3)]
    assert turns == [("d0", "p0"), ("d1", "p1"), ("d0", "p0")]
    drawn = {names(view, policy=Policy.RANDOM, request_id=str(n)) for n in range(50)}
    assert drawn == {("d0", "p0"), ("d0", "p1"), ("d1", "p0"), ("d1", "p1")}
    assert names([P0, D0], num_tokens=31, policy=Policy.ROUND_ROBIN) == ("d0", None)


HERE = {"fingerprint": "x", "host": "h", "num_pinnable_blocks": 500}


def holding(candidate: Candidate, num_blocks: int, **changes: object) -> Candidate:
    return replace(candidate, **(HERE | {"num_prefix_blocks": num_blocks} | changes))  # type: ignore[arg-type]


def test_a_prefix_is_pulled_where_that_is_quicker_than_computing_it() -> None:
    """d0 holds 2000 tokens of 2048, and is too busy: d1 reads 125 blocks of 500 kB, at 2 GB/s, for its own use."""
    busy, idle = holding(D0, 125, num_requests=40), holding(D1, 0)
    found = route([busy, idle], num_tokens=2048)
    pull = found.chosen.pull
    assert pull is not None
    assert (found.decode, pull.holder, pull.num_blocks, pull.total_blocks) == (idle, busy, 125, 125)
    terms = found.chosen.terms
    assert terms.pull_s == pytest.approx(0.004 + 125 * 500_000 / 2e9)
    assert terms.prefill_s == pytest.approx(0.048)
    assert found.num_uncached_tokens == 48
    assert pull.compute_s == pytest.approx(2.0)
    assert terms.evict_s == pull.evict_s == pytest.approx(0.2 * 2.0)
    assert terms.total_s == pytest.approx(terms.pull_s + terms.prefill_s + terms.evict_s + terms.decode_s)
    assert found.pull_reason == "pulls 125 blocks from d0, in 0.035 s instead of computing them in 2.000 s"
    assert str(found.chosen).startswith("d0:d1 0.0+35.2+48.0+")
    slow = replace(idle, rates=replace(RATES, pull_bytes_per_s=1e7))
    found = route([busy, slow], num_tokens=2048)
    assert found.chosen.pull is None


def test_a_copy_is_made_where_it_saves_more_than_its_room_is_worth() -> None:
    """d0 holds it and has the queue of a prompt; reading it takes 35 ms, and its room is worth 400."""
    holder, idle = holding(P0, 125), holding(P1, 0)
    for queued, chosen in ((400, "p0"), (500, "p1")):
        assert names([replace(holder, num_queued_prefill_tokens=queued), idle, D0], num_tokens=2048) == ("d0", chosen)
    on_host = holding(P1, 100, num_prefix_host_blocks=100)
    pull = route([replace(holder, num_queued_prefill_tokens=5000), on_host, D0], num_tokens=2048).chosen.pull
    assert pull is not None
    assert pull.num_blocks == 125
    assert pull.evict_s == pytest.approx(0.2 * 25 * 16 / 1000), (
        "what is on the host would be copied to the device anyway"
    )


def test_a_prefill_worker_pulls_too_also_from_who_will_decode() -> None:
    decoder = holding(D0, 60, num_requests=9)
    found = route([holding(P0, 10), decoder], num_tokens=1000)
    pull = found.chosen.pull
    assert pull is not None
    assert (found.prefill, pull.holder, pull.num_blocks, pull.total_blocks) == (holding(P0, 10), decoder, 50, 60)
    assert found.chosen.terms.evict_s == pull.evict_s == pytest.approx(0.2 * 50 * 16 / 1000)


def test_the_longest_prefix_that_may_be_pinned_is_pulled() -> None:
    holders = [holding(P0, 40, num_pinnable_blocks=5), holding(P1, 30, num_requests=3), holding(D0, 30)]
    others = [replace(c, num_queued_prefill_tokens=100_000, num_free_blocks=0) for c in holders]
    found = route([*others, holding(D1, 0)], num_tokens=1000)
    pull = found.chosen.pull
    assert pull is not None
    assert (found.decode.key, pull.holder.key, pull.num_blocks) == (D1.key, D0.key, 30)


def test_the_block_of_the_last_token_is_not_pulled() -> None:
    holder = holding(D0, 4, num_requests=1000)
    for num_tokens, num_blocks in ((63, 3), (64, 3), (65, 4), (200, 4)):
        pull = route([holder, holding(D1, 0)], num_tokens=num_tokens).chosen.pull
        assert pull is not None
        assert pull.num_blocks == num_blocks


def test_why_nothing_is_pulled() -> None:
    full = {"num_free_blocks": 0}
    for changes, why in (
        ({"fingerprint": "y"}, "does not pull from d0: its blocks have another size or type"),
        ({"host": "elsewhere"}, "does not pull from d0: it is on another host"),
        ({"num_pinnable_blocks": 0}, "does not pull from d0: as much of its cache is pinned as may be"),
    ):
        found = route([holding(D0, 20, **full | changes), holding(D1, 0)])  # type: ignore[arg-type]
        assert (found.decode.key, found.chosen.pull) == (D1.key, None)
        assert found.pull_reason.startswith(why)
    assert route([holding(D0, 20, **full), holding(D1, 20)]).pull_reason == ""
    hasty = holding(D1, 0, rates=replace(RATES, prefill_tokens_per_s=1e6))
    assert (
        "does not pull 20 blocks from d0 in 0.009 s instead of" in route([holding(D0, 20, **full), hasty]).pull_reason
    )
    for policy in (Policy.LEAST_LOADED, Policy.RANDOM, Policy.ROUND_ROBIN):
        found = route([holding(D0, 20, **full), holding(D1, 0)], policy=policy)
        assert (found.chosen.pull, found.pull_reason) == (None, "")


MEASURED = st.floats(min_value=1e-4, max_value=1e4)
ANY_RATES = st.builds(Rates, *(st.one_of(st.just(0.0), MEASURED) for _ in range(8)))


VERSIONS = st.sampled_from((*[Protocol(1, 1)] * 4, Protocol(1, 2), Protocol(2, 2), Protocol(2, 3), Protocol(3, 3)))
PATHS = st.one_of(st.none(), st.frozensets(st.sampled_from((TCP, RDMA, HERE_MEMORY)), min_size=1))
ABILITIES = st.one_of(st.just(Abilities()), st.builds(Abilities, VERSIONS, PATHS))


NAMES = st.sampled_from(("", "1", "2"))
PLACES = st.builds(Place, NAMES, NAMES, NAMES)
MEASURED_TRANSFER = st.builds(TransferRate, st.sampled_from(Distance), st.floats(1e6, 1e10), st.floats(0.0, 0.1))
TRANSFER_RATES = st.lists(MEASURED_TRANSFER, max_size=4, unique_by=lambda r: r.distance).map(tuple)


@st.composite
def views(draw: st.DrawFn) -> list[Candidate]:
    count = st.integers(min_value=0, max_value=60)
    found = []
    for role, letter in ((Role.PREFILL, "p"), (Role.DECODE, "d")):
        for index in range(draw(st.integers(min_value=1, max_value=3))):
            num_prefix_blocks = draw(count)
            found.append(
                worker(
                    f"{letter}{index}", role, content_fingerprint=draw(st.sampled_from("fg")),
                    block_size=draw(st.sampled_from((16, 32))), block_nbytes=draw(st.integers(1, 10**6)),
                    num_requests=draw(count), num_queued_prefill_tokens=draw(count) * 50,
                    num_free_blocks=draw(count), num_prefix_blocks=num_prefix_blocks,
                    num_prefix_host_blocks=draw(st.integers(0, num_prefix_blocks)), rates=draw(ANY_RATES),
                    draining=draw(st.integers(0, 5)) == 0, fingerprint=draw(st.sampled_from("xy")),
                    host=draw(st.sampled_from(("", "here", "here", "there"))),
                    num_pinnable_blocks=draw(st.integers(0, 100)), abilities=draw(ABILITIES),
                    place=draw(PLACES), transfer_rates=draw(TRANSFER_RATES),
                )
            )  # fmt: skip
    return found


@st.composite
def sharing_views(draw: st.DrawFn) -> list[Candidate]:
    """As ``views``, but most workers could read from most others, quickly."""
    slow = st.floats(1.0, 1000.0)
    return [
        replace(
            c, fingerprint=draw(st.sampled_from("xxxy")), host=draw(st.sampled_from(("", "here", "here", "here"))),
            num_pinnable_blocks=draw(st.sampled_from((0, 1, 9, 100, 100))),
            rates=replace(
                c.rates, prefill_tokens_per_s=draw(slow), pull_bytes_per_s=draw(st.floats(1e7, 1e10)),
                pull_overhead_s=draw(st.floats(1e-4, 0.1)),
            ),
        )
        for c in draw(views())
    ]  # fmt: skip


def chosen_keys(found: Route) -> set[WorkerKey]:
    return {c.key for c in (found.decode, found.prefill) if c is not None}


def try_route(view: Sequence[Candidate], num_tokens: int, **kwargs: object) -> Route | None:
    try:
        return route(view, num_tokens, **kwargs)  # type: ignore[arg-type]
    except NoWorkerError:
        return None


@given(views(), st.integers(1, 800), st.data())
def test_more_load_never_attracts(view: list[Candidate], num_tokens: int, data: st.DataObject) -> None:
    before = try_route(view, num_tokens)
    index = data.draw(st.integers(0, len(view) - 1))
    more = st.integers(0, 100)
    loaded = replace(
        view[index],
        num_requests=view[index].num_requests + data.draw(more),
        num_queued_prefill_tokens=view[index].num_queued_prefill_tokens + data.draw(more),
        num_free_blocks=max(0, view[index].num_free_blocks - data.draw(more)),
    )
    after = try_route([*view[:index], loaded, *view[index + 1 :]], num_tokens)
    if before is not None and after is not None and loaded.key not in chosen_keys(before):
        assert loaded.key not in chosen_keys(after)


@given(st.one_of(views(), sharing_views()), st.integers(1, 800), st.data())
def test_more_of_the_prefix_never_repels(view: list[Candidate], num_tokens: int, data: st.DataObject) -> None:
    """Save to one who reads it from there."""
    before = try_route(view, num_tokens)
    if before is None:
        return
    taken = data.draw(st.sampled_from([c for c in (before.decode, before.prefill) if c is not None]))
    index = view.index(taken)
    better = replace(taken, num_prefix_blocks=taken.num_prefix_blocks + data.draw(st.integers(1, 60)))
    after = try_route([*view[:index], better, *view[index + 1 :]], num_tokens)
    assert after is not None
    pull = after.chosen.pull
    assert taken.key in chosen_keys(after) or (pull is not None and pull.holder.key == taken.key)


@given(st.one_of(views(), sharing_views()), st.integers(1, 800))
def test_a_pull_is_possible_and_pays(view: list[Candidate], num_tokens: int) -> None:
    found = try_route(view, num_tokens)
    if found is None:
        return
    rates = Costs([c for c in view if not c.draining], Demand(num_tokens, 1000))._rates
    for option in found.options:
        worker, pull = option.prefill or option.decode, option.pull
        if pull is None:
            assert option.terms.pull_s == 0.0
            continue
        assert pull.holder.key != worker.key
        assert not pull.holder.draining
        assert (pull.holder.fingerprint, pull.holder.host) == (worker.fingerprint, worker.host)
        assert worker.host
        assert 0 < pull.num_blocks <= pull.holder.num_pinnable_blocks
        assert pull.total_blocks == worker.num_prefix_device_blocks + pull.num_blocks
        assert worker.num_prefix_blocks < pull.total_blocks <= pull.holder.num_prefix_device_blocks
        assert pull.total_blocks * worker.block_size < num_tokens, "the last token is always computed"
        assert option.terms.pull_s == pull.pull_s < pull.compute_s
        computed = option.terms.prefill_s * rates[worker.key].prefill_tokens_per_s
        assert computed == pytest.approx(num_tokens - pull.total_blocks * worker.block_size)
        assert computed > 0
    if found.chosen.pull is not None:
        assert found.chosen.pull.holder.key.worker_id in found.pull_reason
        assert found.pull_reason in found.reason


@given(st.one_of(views(), sharing_views()), st.integers(1, 800))
def test_pulling_never_makes_a_request_dearer(view: list[Candidate], num_tokens: int) -> None:
    found = try_route(view, num_tokens)
    apart = try_route([replace(c, host="") for c in view], num_tokens)
    if found is None or apart is None:
        return
    assert found.chosen.rank[:2] <= apart.chosen.rank[:2]
    assert apart.chosen.pull is None


@given(st.one_of(views(), sharing_views()), st.integers(1, 800), st.data())
def test_a_prefix_on_the_host_never_attracts_more_than_one_on_the_device(
    view: list[Candidate], num_tokens: int, data: st.DataObject
) -> None:
    before = try_route(view, num_tokens)
    index = data.draw(st.integers(0, len(view) - 1))
    num_blocks = data.draw(st.integers(view[index].num_prefix_host_blocks, view[index].num_prefix_blocks))
    evicted = replace(view[index], num_prefix_host_blocks=num_blocks)
    after = try_route([*view[:index], evicted, *view[index + 1 :]], num_tokens)
    if before is None or after is None or (before.chosen.pull and before.chosen.pull.holder.key == evicted.key):
        return  # whoever would have read it there cannot any more
    if evicted.key not in chosen_keys(before):
        assert evicted.key not in chosen_keys(after)


@given(st.one_of(views(), sharing_views()), st.integers(1, 800))
def test_the_best_is_the_best_of_all(view: list[Candidate], num_tokens: int) -> None:
    costs = Costs(view, Demand(num_tokens, 1000))
    writers = [c for c in view if c.role is Role.PREFILL]
    for decode in (c for c in view if c.role is Role.DECODE):
        every = [costs.alone(decode), *(costs.split(decode, writer) for writer in writers)]
        assert costs.best(costs.alone(decode), costs.soonest_first(writers)) == min(
            every, key=lambda option: option.rank
        )


@given(views(), st.integers(1, 800), st.sampled_from(Policy), st.integers(0, 9), VERSIONS, st.data())
def test_equal_views_give_equal_routes_to_those_who_can(
    view: list[Candidate], num_tokens: int, policy: Policy, turn: int, spoken: Protocol, data: st.DataObject
) -> None:
    excluded = tuple(data.draw(st.sets(st.sampled_from(view), max_size=2)))
    settings = {"excluded": excluded, "policy": policy, "turn": turn, "spoken": spoken}
    found = try_route(view, num_tokens, **settings)
    assert try_route(data.draw(st.permutations(view)), num_tokens, **settings) == found
    if found is None:
        for c in view:
            speaks = c.abilities.protocol.overlaps(spoken)
            assert c.role is not Role.DECODE or c.draining or c in excluded or not speaks
        return
    for option in found.options:
        for c in (option.decode, option.prefill):
            assert c is None or (not c.draining and c not in excluded and share_a_version(c.abilities.protocol, spoken))
        assert option.prefill is None or fit(option.prefill, option.decode)
        if pull := option.pull:
            reader = option.prefill or option.decode
            assert share_a_version(pull.holder.abilities.protocol, reader.abilities.protocol)
    told = {p.worker_id for p in found.passed_over}
    for c in view:
        can = c.key not in {e.key for e in excluded} and not c.draining
        can = can and share_a_version(c.abilities.protocol, spoken)
        can = can and (c.role is Role.DECODE or fit(c, found.decode))
        assert (c.key.worker_id in told) is not can, "who is not compared is told of, with a reason"
    with_it = {o.prefill.key.worker_id for o in found.options if o.decode == found.decode and o.prefill}
    assert with_it == {c.key.worker_id for c in view if c.role is Role.PREFILL} - told
    ranks = [option.rank for option in found.options]
    assert ranks == sorted(ranks)
    if policy is Policy.KV_AWARE:
        assert found.chosen == found.options[0]


def share_a_version(a: Protocol, b: Protocol) -> bool:
    return bool(set(range(a.oldest, a.newest + 1)) & set(range(b.oldest, b.newest + 1)))


def fit(prefill: Candidate, decode: Candidate) -> bool:
    """The rule, from its definition."""
    a, b = prefill.abilities, decode.abilities
    shared = a.paths is None or b.paths is None or any(path in b.paths for path in a.paths)
    return (
        prefill.content_fingerprint == decode.content_fingerprint and share_a_version(a.protocol, b.protocol) and shared
    )


@given(views(), st.data())
def test_partners_are_those_who_fit_and_whoever_does_not_has_a_reason(
    view: list[Candidate], data: st.DataObject
) -> None:
    prefills = sorted((c for c in view if c.role is Role.PREFILL), key=lambda c: c.key.worker_id)
    partners = Partners(prefills)
    for decode in data.draw(st.permutations([c for c in view if c.role is Role.DECODE])):
        assert list(partners.of(decode)) == [p for p in prefills if fit(p, decode)]
        for p in prefills:
            assert bool(why_not_pair(p, decode)) is not fit(p, decode)
            # Who learns to speak or to reach more loses no partner.
            newest = p.abilities.protocol.newest + data.draw(st.integers(0, 2))
            abler = speaking(p, p.abilities.protocol.oldest, newest)
            if abler.abilities.paths is not None:
                abler = reached_by(abler, *abler.abilities.paths, data.draw(st.sampled_from((TCP, RDMA))))
            assert fit(p, decode) <= (not why_not_pair(abler, decode))


@given(VERSIONS, VERSIONS)
def test_protocols_overlap_where_they_share_a_version(a: Protocol, b: Protocol) -> None:
    assert a.overlaps(b) is b.overlaps(a) is share_a_version(a, b)


def test_what_was_not_said_of_a_protocol() -> None:
    assert [str(Protocol.said(*said)) for said in ((0, 0), (0, 3), (2, 3))] == ["1", "3", "2 to 3"]
    assert not Protocol.said(3, 2).overlaps(Protocol(1, 9)), "nonsense is spoken by nobody"
