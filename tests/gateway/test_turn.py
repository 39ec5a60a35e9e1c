"""What is due is seen to together."""

from __future__ import annotations

import asyncio

from gateway.turn import Turn


async def test_what_is_added_in_one_turn_is_called_together_in_order() -> None:
    turn, called, all_called = Turn(), list[str](), asyncio.Event()
    for name in ("a", "b", "c"):
        turn.add(lambda name=name: called.append(name))  # type: ignore[misc]
    turn.add(all_called.set)
    assert called == [], "whoever adds may have more to add"
    await all_called.wait()
    assert called == ["a", "b", "c"]


async def test_what_is_added_meanwhile_has_the_next_turn() -> None:
    turn, called, all_called = Turn(), list[str](), asyncio.Event()

    def again() -> None:
        called.append("again")
        all_called.set()

    turn.add(lambda: turn.add(again))
    turn.add(lambda: called.append("first"))
    await all_called.wait()
    assert called == ["first", "again"]
