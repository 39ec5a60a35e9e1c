"""Who goes on at once, who waits, and who is told to come again."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from gateway.admission import PATIENCE, Objectives
from gateway.candidates import Rates
from gateway.config import GatewayConfig
from gateway.routing import Policy
from kvferry.errors import OverloadedError
from tests.gateway.test_routing import D0, D1, P0, P1, route

BUSY = replace(D0, num_requests=4)


def test_a_prompt_waits_where_enough_work_waits_already() -> None:
    objectives = Objectives(max_queue_s=0.25)
    for queued, room in ((0, True), (250, True), (251, False)):
        prefill = replace(P0, num_queued_prefill_tokens=queued)
        assert objectives.has_room(route([prefill, replace(BUSY, num_queued_prefill_tokens=9000)])) is room


def test_the_first_of_the_line_takes_another_worker_where_waiting_would_cost_those_behind_it_more() -> None:
    """At 1000 tokens/s the best has a second of prompts waiting; the other has room, and ten requests that would lose
    half a second each, nine more than there, and take longer for a step."""
    best, other = replace(D0, num_queued_prefill_tokens=1000, num_requests=1), replace(D1, num_requests=10)
    found, objectives = route([best, other]), Objectives()
    assert found.decode is best
    more_s = found.options[1].terms.total_s - found.chosen.terms.total_s
    assert 4 < more_s < 5
    for num_behind, taken in ((0, None), (4, None), (5, other)):
        instead = objectives.with_room(found, num_behind)
        assert (instead.decode if instead else None) is taken
    full = route([best, replace(other, num_free_blocks=3)])
    assert objectives.with_room(full, 99) is None
    assert objectives.with_room(replace(found, policy=Policy.ROUND_ROBIN), 99) is None
    idle = route([replace(best, num_queued_prefill_tokens=0), other])
    assert objectives.with_room(idle, 99) is idle


def test_a_prompt_is_put_upon_streams_when_what_they_lose_is_less_than_what_all_lose_who_wait() -> None:
    """Half a second of computing, for which four streams lose 0.5 s each, weighed five times, is 10 s; and waiting a second
    for the prefill worker would cost those behind a second each."""
    busy = replace(P0, num_queued_prefill_tokens=1000)
    found, objectives = route([busy, BUSY]), Objectives()
    assert found.prefill is busy
    assert objectives.with_room(found, 8) is None
    alone = objectives.with_room(found, 10)
    assert alone is not None
    assert alone.prefill is None
    other = route([busy, replace(P1, num_queued_prefill_tokens=1100, rates=Rates()), BUSY])
    instead = Objectives().with_room(other, 99)
    assert instead is not None
    assert instead.prefill is not None
    assert instead.prefill.key == P1.key


def test_nobody_waits_for_a_speed_that_was_not_measured() -> None:
    unmeasured = replace(P0, num_queued_prefill_tokens=10**6, rates=Rates())
    assert Objectives().has_room(route([unmeasured, replace(D0, num_queued_prefill_tokens=10**7, rates=Rates())]))


def test_a_full_decode_worker_is_waited_for_unless_it_has_nothing_to_do() -> None:
    full = replace(BUSY, num_free_blocks=3)
    assert not Objectives().has_room(route([P0, full]))
    assert Objectives().has_room(route([P0, replace(full, num_requests=0)]))


def test_a_decode_worker_takes_as_many_as_leave_its_steps_short() -> None:
    objectives = Objectives(itl_s=0.0325)  # 20 ms and 2 ms for each of six
    assert objectives.has_room(route([P0, replace(D0, num_requests=5)]))
    assert not objectives.has_room(route([P0, replace(D0, num_requests=6)]))


def test_others_go_first_for_as_long_as_a_prompts_own_length_and_objective_allow() -> None:
    """500 tokens at 1000 a second, two round trips of 1 ms, 16 ms for the bytes of 32 blocks, a step of 22 ms."""
    found = route([P0, D0])
    assert Objectives().patience_s(found) == pytest.approx(PATIENCE * 0.5)
    cached = route([replace(P0, num_prefix_blocks=25), D0])
    assert Objectives().patience_s(cached) == pytest.approx(PATIENCE * 0.1), "what is computed counts"
    own_s = 0.5 + 0.002 + 32 * 500_000 / 1e9 + 0.022
    assert Objectives(ttft_s=1.0).patience_s(found) == pytest.approx(1.0 - own_s - 0.25)
    assert Objectives(ttft_s=0.1).patience_s(found) == Objectives(patience=0.0).patience_s(found) == 0


def test_objectives_are_what_the_gateway_was_told() -> None:
    assert GatewayConfig().objectives == Objectives()
    told = GatewayConfig(max_queue_s=1.0, slo_ttft_s=2.0, slo_itl_s=3.0, patience=5.0)
    assert told.objectives == Objectives(1.0, 2.0, 3.0, 5.0)


def test_who_would_come_too_late_is_told_when_to_come_again() -> None:
    found = route([P0, D0])  # about 0.5 s of its own
    objectives = Objectives(ttft_s=2.0)
    objectives.check(found, 1.4)
    with pytest.raises(OverloadedError, match="2 s is this gateway's objective") as caught:
        objectives.check(found, 2.0)
    assert caught.value.reason == "TTFT_SLO"
    assert caught.value.retry_after_s == pytest.approx(0.53, abs=0.1)
    Objectives(ttft_s=inf).check(found, 1e9)


def test_a_prompt_that_is_itself_too_long_is_served_when_nobody_waits() -> None:
    found = route([P0, D0], num_tokens=5000)
    Objectives(ttft_s=2.0).check(found, 0.0)
    with pytest.raises(OverloadedError):
        Objectives(ttft_s=2.0).check(found, 0.5)
