"""Other workers' pools: opened once, closed when nobody needs them, and never a wait for somebody else's sake."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from kvferry.errors import UnavailableError
from services.worker.remotes import Owner, Remotes
from transport import Region, RemoteRegion, Transport, create

A, A_AGAIN, B = Owner("a", 1), Owner("a", 2), Owner("b", 1)


@pytest.fixture
def region() -> Iterator[Region]:
    with create("loopback") as owner, owner.allocate(64) as region:
        yield region


class Recording:
    """A loopback transport that counts what is open and can make opening wait."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.opened: list[RemoteRegion] = []
        self.may_open = threading.Event()
        self.may_open.set()

    def open(self, descriptor: bytes) -> RemoteRegion:
        self.may_open.wait(10)
        remote = self.inner.open(descriptor)
        self.opened.append(remote)
        return remote

    @property
    def num_open(self) -> int:
        return sum(not remote.closed for remote in self.opened)


@pytest.fixture
def transport() -> Iterator[Recording]:
    with create("loopback") as inner:
        yield Recording(inner)


@pytest.fixture
def remotes(transport: Recording) -> Remotes:
    return Remotes(transport)  # type: ignore[arg-type]


async def test_one_region_serves_many_tickets(remotes: Remotes, transport: Recording, region: Region) -> None:
    first, second = await asyncio.gather(remotes.acquire(A, region.descriptor), remotes.acquire(A, region.descriptor))
    assert first is second
    remotes.release(A)
    remotes.release(A)
    assert await remotes.acquire(A, region.descriptor) is first
    remotes.release(A)
    await remotes.close()
    assert (len(transport.opened), transport.num_open) == (1, 0)


async def test_a_lost_owner_is_closed_by_its_last_user(remotes: Remotes, transport: Recording, region: Region) -> None:
    await remotes.acquire(A, region.descriptor)
    remotes.forget(A)
    await asyncio.sleep(0.05)  # a close, if one were on its way, would have happened
    assert transport.num_open == 1, "a write may still be under way"
    remotes.release(A)
    await remotes.close()
    assert transport.num_open == 0


async def test_a_new_incarnation_replaces_the_old(remotes: Remotes, transport: Recording, region: Region) -> None:
    await remotes.acquire(A, region.descriptor)
    remotes.release(A)
    await remotes.acquire(A_AGAIN, region.descriptor)
    await asyncio.sleep(0.05)
    assert (len(transport.opened), transport.num_open) == (2, 1)
    remotes.release(A_AGAIN)
    await remotes.close()


async def test_an_owner_that_does_not_answer_delays_nobody_else(
    remotes: Remotes, transport: Recording, region: Region
) -> None:
    transport.may_open.clear()
    stuck = asyncio.create_task(remotes.acquire(A, region.descriptor))
    await asyncio.sleep(0.02)
    began = asyncio.get_running_loop().time()
    remotes.release(B)  # unknown: ignored
    assert asyncio.get_running_loop().time() - began < 0.01
    stuck.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stuck
    transport.may_open.set()
    await remotes.close()
    assert (len(transport.opened), transport.num_open) == (1, 0), "opened for nobody, and closed"


async def test_a_failed_opening_is_not_kept_for_the_next(
    remotes: Remotes, transport: Recording, region: Region
) -> None:
    """Its only caller left before it failed."""
    transport.may_open.clear()
    gone = asyncio.create_task(remotes.acquire(A, b"garbled"))
    await asyncio.sleep(0.02)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    transport.may_open.set()
    await asyncio.sleep(0.05)
    await remotes.acquire(A, region.descriptor)
    remotes.release(A)
    await remotes.close()
    assert transport.num_open == 0


async def test_what_cannot_be_opened_is_a_typed_error_and_tried_anew(remotes: Remotes, region: Region) -> None:
    with pytest.raises(UnavailableError, match="pool of a") as refused:
        await remotes.acquire(A, b"garbled")
    assert refused.value.reason == "OWNER_LOST"
    await remotes.acquire(A, region.descriptor)
    remotes.release(A)
    await remotes.close()
