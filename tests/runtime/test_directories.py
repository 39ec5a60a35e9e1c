from __future__ import annotations

import pytest

from services.runtime.directories import Directories


async def test_whoever_finds_one_lost_goes_on_to_the_next_once() -> None:
    async with Directories(
        ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"), choose=lambda count: count - 1
    ) as directories:
        first = directories.current
        assert first.address == "127.0.0.1:3"
        directories.move_on(first)
        directories.move_on(first)  # another caller, whose call had been lost at the same time
        assert directories.current.address == "127.0.0.1:1"
        directories.move_on(directories.current)
        assert directories.current.address == "127.0.0.1:2"


async def test_the_only_one_is_tried_again() -> None:
    async with Directories(("127.0.0.1:1",)) as directories:
        directories.move_on(directories.current)
        assert directories.current.address == "127.0.0.1:1"


async def test_there_must_be_one() -> None:
    with pytest.raises(ValueError, match="at least one directory"):
        Directories(())
