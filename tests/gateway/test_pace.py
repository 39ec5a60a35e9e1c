"""Streams are woken together, and the less often the longer sending takes."""

from __future__ import annotations

import asyncio
import time

from gateway.pace import MAX_REST_S, WINDOW_S, Load, Pace

BURST_S = 0.04


async def test_what_is_added_in_one_turn_is_woken_together_in_order() -> None:
    pace, woken, all_woken = Pace(lambda: False), list[str](), asyncio.Event()
    for name in ("a", "b", "c"):
        pace.add(lambda name=name: woken.append(name))  # type: ignore[misc]
    pace.add(all_woken.set)
    assert woken == [], "whoever adds may have more to add"
    await all_woken.wait()
    assert woken == ["a", "b", "c"]


async def test_while_it_keeps_up_nobody_waits() -> None:
    pace, slowest_s = Pace(lambda: False), []
    for _ in range(20):
        woken, began_s = asyncio.Event(), time.monotonic()
        pace.add(woken.set)
        await woken.wait()
        slowest_s.append(time.monotonic() - began_s)
    assert sorted(slowest_s)[10] < 0.005


async def test_a_burst_is_followed_by_a_rest_as_long_in_which_others_gather() -> None:
    pace, woken, all_woken = Pace(lambda: True), list[float](), asyncio.Event()
    sent = asyncio.Event()

    async def send() -> None:  # as a client's stream does once it is woken
        await sent.wait()
        time.sleep(BURST_S)  # noqa: ASYNC251

    sending = asyncio.create_task(send())
    await asyncio.sleep(0)
    pace.add(sent.set)
    await sending
    ended_s = time.monotonic()
    for delay_s in (0.0, BURST_S / 4):
        await asyncio.sleep(delay_s)
        pace.add(lambda: woken.append(time.monotonic()))
    pace.add(all_woken.set)
    await all_woken.wait()
    first_s, second_s = woken
    assert first_s - ended_s >= BURST_S * 0.9
    assert second_s - first_s < BURST_S / 4, "both in one turn"


async def test_a_rest_is_bounded() -> None:
    pace, woken = Pace(lambda: True), asyncio.Event()
    pace.add(lambda: time.sleep(2 * MAX_REST_S))
    await asyncio.sleep(0.001)
    began_s = time.monotonic()
    pace.add(woken.set)
    await woken.wait()
    assert time.monotonic() - began_s < 1.6 * MAX_REST_S


async def test_a_loop_that_keeps_up_does_not_rest_after_a_burst() -> None:
    pace, woken = Pace(lambda: False), asyncio.Event()
    pace.add(lambda: time.sleep(BURST_S))
    await asyncio.sleep(0.001)
    began_s = time.monotonic()
    pace.add(woken.set)
    await woken.wait()
    assert time.monotonic() - began_s < BURST_S / 4


def test_behind_is_who_uses_a_core_until_it_uses_half_of_one() -> None:
    now_s = cpu_s = 0.0
    load = Load(lambda: now_s, lambda: cpu_s)
    seen = []
    for share in (0.7, 0.9, 0.6, 0.51, 0.4, 0.7):
        now_s, cpu_s = now_s + WINDOW_S, cpu_s + share * WINDOW_S
        seen.append(load.is_behind())
    assert seen == [False, True, True, True, False, False]
    now_s, cpu_s = now_s + 0.9 * WINDOW_S, cpu_s + 0.9 * WINDOW_S
    assert not load.is_behind(), "too early to tell"
