"""Every instant has one phase."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.phase_book import COMPUTED, Phase, PhaseBook
from services.engine.phases import Ceilings, Piece, demand_of
from tests.engine.test_phases import SHAPE, pieces

CEILINGS = Ceilings(1e6, 1e6)


def book() -> PhaseBook:
    return PhaseBook(SHAPE, CEILINGS, began_s=100.0)


events = st.lists(
    st.tuples(
        st.sampled_from(["compute", "rest", "transfer", "transferred", "look", "step"]),
        st.floats(0, 5),
        st.floats(0, 5),
        st.lists(pieces(), max_size=3),
        st.lists(pieces(), max_size=3),
    ),
    max_size=40,
)


@given(events)
def test_all_time_is_given_out_once_and_nothing_is_taken_back(history: list[tuple]) -> None:
    made, now_s, num_transfers = book(), 100.0, 0
    before = dict(made.seconds)
    for kind, pause_s, step_s, prefill, decode in history:
        now_s += pause_s
        match kind:
            case "compute":
                made.compute(now_s)
            case "rest":
                made.rest(now_s)
            case "look":
                made.look(now_s)
            case "transfer":
                made.transfer(now_s)
                num_transfers += 1
            case "transferred" if num_transfers:
                made.transferred(now_s)
                num_transfers -= 1
            case "step" if prefill or decode:
                made.compute(now_s)
                made.step(prefill, decode, now_s, now_s + step_s)
                now_s += step_s
        made.check_integrity()
        assert made.told_s <= now_s
        assert all(made.seconds[phase] >= before[phase] for phase in Phase)
        before = dict(made.seconds)
    made.rest(now_s)
    made.look(now_s)
    assert sum(made.seconds.values()) == pytest.approx(now_s - 100.0)


def test_a_transfer_takes_time_only_where_nothing_is_computed() -> None:
    made = book()
    made.transfer(101.0)  # a second idle
    made.compute(102.0)  # a second of transfer
    made.step([Piece(4, 4, 1)], [], 102.5, 104.5)  # half a second of getting there
    made.step([Piece(4, 8, 1)], [], 104.5, 105.0)
    made.rest(105.0)
    made.transferred(105.25)
    made.look(106.0)
    assert made.seconds == {Phase.IDLE: 2.25, Phase.TRANSFER: 1.25, Phase.PREFILL: 2.5, Phase.DECODE: 0.0}


def test_a_mixed_step_is_shared_by_what_each_part_takes_at_least() -> None:
    made = book()
    prefill, decode = [Piece(8, 8, 1)], [Piece(1, 20, 1)]
    made.compute(100.0)
    made.step(prefill, decode, 100.0, 110.0)
    assert made.seconds[Phase.PREFILL] + made.seconds[Phase.DECODE] == pytest.approx(10.0)
    assert made.seconds[Phase.PREFILL] > made.seconds[Phase.DECODE] > 0
    whole = demand_of(SHAPE, [*prefill, *decode])
    assert sum(made.demands[phase].flops for phase in COMPUTED) == whole.flops


def test_utilization_is_of_the_last_seconds_of_work() -> None:
    made = book()
    step = [Piece(1, 20, 1)]
    demand = demand_of(SHAPE, step)
    now_s = 100.0
    for elapsed_s, repeats in ((0.1, 1000), (0.05, 4000)):  # 100 s, then 200 s at twice the speed
        for _ in range(repeats):
            made.step([], step, now_s, now_s + elapsed_s)
            now_s += elapsed_s
    use = made.use(Phase.DECODE)
    assert use.intensity == pytest.approx(demand.intensity)
    assert use.mfu == pytest.approx(demand.flops / 0.05 / CEILINGS.flops_per_s, rel=1e-3)
    assert use.mbu == pytest.approx(demand.nbytes / 0.05 / CEILINGS.bytes_per_s, rel=1e-3)
    assert made.shares[Phase.DECODE] == pytest.approx(1.0, abs=1e-3)
    made.look(now_s + 0.0)
    made.rest(now_s + 10.0)
    made.look(now_s + 10.0)
    assert made.use(Phase.DECODE) == use  # idling does not change it
    assert made.use(Phase.PREFILL).mfu == 0.0


def test_steps_of_an_unknown_shape_are_shared_by_tokens() -> None:
    made = PhaseBook(began_s=0.0)
    made.step([Piece(3, 3, 1)], [Piece(1, 9, 1)], 0.0, 4.0)
    assert (made.seconds[Phase.PREFILL], made.seconds[Phase.DECODE]) == (3.0, 1.0)
    assert made.use(Phase.PREFILL).intensity == 0.0
