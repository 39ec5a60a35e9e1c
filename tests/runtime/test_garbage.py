"""Garbage is looked for when it is quiet, or when there is much of it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from services.runtime import garbage
from services.runtime.garbage import GROWTH_NBYTES, collect_when_quiet


class Ring:
    def __init__(self) -> None:
        self.itself = self


def old_ring() -> weakref.ref[Ring]:
    """One that only a look at what has lived long finds."""
    ring = Ring()
    found = weakref.ref(ring)
    gc.collect(1)
    del ring
    return found


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(garbage, "LOOK_INTERVAL_S", 0.01)
    before = gc.get_threshold()
    yield
    assert gc.get_threshold() == before


@pytest.mark.parametrize(("is_quiet", "grown_nbytes", "looks"), [
    (True, 0, True), (False, 0, False), (False, GROWTH_NBYTES // 2, False), (False, 4 * GROWTH_NBYTES, True),
])  # fmt: skip
async def test_it_looks_when_nobody_waits_or_there_is_much(
    monkeypatch: pytest.MonkeyPatch, is_quiet: bool, grown_nbytes: int, looks: bool
) -> None:
    nbytes = GROWTH_NBYTES
    monkeypatch.setattr(garbage, "resident_nbytes", lambda: nbytes)
    looking = asyncio.create_task(collect_when_quiet(lambda: is_quiet))
    await asyncio.sleep(0)
    ring = old_ring()
    nbytes += grown_nbytes
    for _ in range(20):
        gc.collect(1)  # as Python itself does
        await asyncio.sleep(0.01)
    looking.cancel()
    await asyncio.wait((looking,))
    assert (ring() is None) == looks


async def test_python_does_not_look_by_itself() -> None:
    looking = asyncio.create_task(collect_when_quiet(lambda: False))
    await asyncio.sleep(0)
    ring = old_ring()
    kept: list[list[int]] = []
    for _ in range(200_000):
        kept.append([])
    assert ring() is not None
    looking.cancel()
    await asyncio.wait((looking,))


def test_memory_is_counted_in_bytes() -> None:
    before = garbage.resident_nbytes()
    much = bytearray(b"x" * 256 * 1024 * 1024)
    assert 200 << 20 < garbage.resident_nbytes() - before < 800 << 20
    del much
