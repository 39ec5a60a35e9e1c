from __future__ import annotations

import asyncio

from services.runtime.tasks import Tasks

FOR_EVER_S = 3600.0


async def test_stopping_ends_what_is_spawned_meanwhile_too() -> None:
    tasks = Tasks()

    async def spawns_in_its_last_moments() -> None:
        try:
            await asyncio.sleep(FOR_EVER_S)
        finally:
            tasks.spawn(asyncio.sleep(FOR_EVER_S))

    task = tasks.spawn(spawns_in_its_last_moments())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await tasks.stop()
    assert task.cancelled()
    assert len(tasks) == 0


async def test_all_have_ended_with_those_that_others_spawned() -> None:
    tasks, order = Tasks(), []

    async def work(depth: int) -> int:
        await asyncio.sleep(0)
        if depth:
            tasks.spawn(work(depth - 1))
        order.append(depth)
        return depth

    first = tasks.spawn(work(2))
    await tasks.ended()
    assert (order, await first, len(tasks)) == ([2, 1, 0], 2, 0)
