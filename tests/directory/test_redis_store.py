"""Several directories on one Redis: what one is told all know, and what Redis loses none keeps."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog

from services.directory.core import SequenceGapError, UnknownLeaseError
from services.directory.events import Cleared, Event, Joined, LeaveReason, Left, Removed, Role, Stored, Worker
from services.directory.redis_link import RedisLink, StoreRefusedError, without_password
from services.directory.redis_store import RedisStore
from services.directory.store import StoreAwayError
from services.directory.watching import Changes
from services.runtime.tier import Tier
from tests.directory.redis_server import RedisServer


def block(n: int) -> bytes:
    return n.to_bytes(16, "big")


def worker(name: str = "a", incarnation: int = 1) -> Worker:
    return Worker(name, incarnation, Role.DECODE, name.encode(), b"load")


def new_store(url: str, *, max_events: int = 1_000, **options: Any) -> RedisStore:
    return RedisStore(RedisLink(url, max_events=max_events, **options), max_events=max_events)


async def until(store: RedisStore, holds: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        await store.watchers.until(holds)


@asynccontextmanager
async def opened(url: str, count: int = 1, **options: Any) -> AsyncIterator[list[RedisStore]]:
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(new_store(url, **options)) for _ in range(count)]
        for store in stores:
            await until(store, lambda store=store: store.state is not None)  # type: ignore[misc]
        yield stores
        for store in stores:
            if store.state is not None:
                store.state.check_integrity()


def held(store: RedisStore, name: str = "a") -> set[bytes]:
    assert store.state is not None
    return set(store.state.index.held_by(name, Tier.DEVICE, 1))


async def next_events(watch: Any) -> Changes:
    """The next that are not a mere sign of life."""
    async with asyncio.timeout(10):
        while True:
            changes: Changes = await anext(watch)
            if changes.events or changes.snapshot:
                return changes


async def drain(watch: Any) -> None:
    """Until it ends."""
    async with asyncio.timeout(10):
        async for _ in watch:
            pass


async def test_what_one_is_told_the_others_know(redis_server: RedisServer) -> None:
    async with opened(redis_server.url, 2) as (one, other):
        lease, revision = await one.register(worker(), 60)
        await until(other, lambda: other.state is not None and other.state.revision >= revision)
        assert await other.publish_blocks(lease, 1, [Stored(block(1) + block(2))]) == 2
        assert await one.publish_blocks(lease, 2, [Removed(block(2))]) == 3
        assert held(one) == {block(1)}
        await until(other, lambda: held(other) == {block(1)})
        # The answer was lost with the one that gave it.
        assert await other.publish_blocks(lease, 2, [Removed(block(2)), Stored(block(3))]) == 4
        assert await other.keep_alive(lease, b"more") == 60
        await until(one, lambda: one.state is not None and one.state.workers["a"].load == b"more")
        assert held(one) == held(other) == {block(1), block(3)}


async def test_a_watch_goes_on_at_another_without_gap_or_repetition(redis_server: RedisServer) -> None:
    async with opened(redis_server.url, 2) as (one, other):
        lease, _ = await one.register(worker(), 60)
        async with aclosing(one.watch(0, 0.2)) as watch:
            changes = await next_events(watch)
        assert changes.snapshot
        for n in range(1, 40):
            # Whichever is asked, it may have heard of it later than the watcher.
            await one.publish_blocks(lease, n, [Stored(block(n))])
            store = (other, one)[n % 2]
            async with aclosing(store.watch(changes.revision, 0.2)) as watch:
                changes = await next_events(watch)
            assert not changes.snapshot
            (event,) = changes.events
            assert event.changes == (Stored(block(n)),)  # type: ignore[union-attr]


async def test_only_one_of_them_says_that_a_lease_ran_out(redis_server: RedisServer) -> None:
    async with opened(redis_server.url, 3) as stores, aclosing(stores[0].watch(0, 0.2)) as watch:
        await next_events(watch)
        await stores[1].register(worker(), 0.4)
        events: list[Event] = []
        while len(events) < 2:
            events += (await next_events(watch)).events
        assert events == [Joined(worker()), Left("a", 1, LeaveReason.EXPIRED)]
        # Each has looked again since.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.2):
                await next_events(watch)


async def test_one_that_falls_behind_the_log_reads_all_anew(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(redis_server.url, 2, max_events=5) as (one, slow):
        lease, revision = await one.register(worker(), 60)
        await until(slow, lambda: slow.state is not None and slow.state.revision >= revision)
        may_read, read = asyncio.Event(), slow._link.entries_after

        async def held_up(after: int, wait_s: float) -> Any:
            entries = await read(after, 0.0)
            await may_read.wait()
            return entries or await read(after, wait_s)

        async with aclosing(slow.watch(0, 0.2)) as watch:
            assert (await next_events(watch)).snapshot
            monkeypatch.setattr(slow._link, "entries_after", held_up)
            await asyncio.sleep(0.6)  # it is held up by now
            for n in range(1, 20):
                await one.publish_blocks(lease, n, [Stored(block(n))])
            may_read.set()
            with pytest.raises(StoreAwayError):
                await drain(watch)
        await until(slow, lambda: slow.state is not None and held(slow) == {block(n) for n in range(1, 20)})
        async with aclosing(slow.watch(revision, 0.2)) as watch:
            assert (await next_events(watch)).snapshot


async def test_a_reading_that_is_cut_off_begins_anew(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(redis_server.url) as (one,):
        lease, _ = await one.register(worker(), 60)
        for n in range(1, 4):
            await one.publish_blocks(lease, n, [Stored(block(n))])
        late, cuts = new_store(redis_server.url), [StoreAwayError("cut off")]
        blocks = late._link.blocks

        async def cut_off(name: str) -> AsyncIterator[Any]:
            async for changes in blocks(name):
                yield changes
                if cuts:
                    raise cuts.pop()

        monkeypatch.setattr(late._link, "blocks", cut_off)
        async with late:
            await until(late, lambda: late.state is not None)
            assert not cuts
            assert held(late) == {block(1), block(2), block(3)}


async def test_a_crash_that_loses_nothing_is_no_event(tmp_path: Path) -> None:
    with RedisServer(tmp_path, persistent=True) as server:
        async with opened(server.url, 2) as (one, other):
            lease, revision = await one.register(worker(), 4.0)
            await one.publish_blocks(lease, 1, [Stored(block(1))])
            revision = one.state.revision if one.state else 0
            server.kill()
            await until(one, lambda: one.state is None)
            await until(other, lambda: other.state is None)
            with pytest.raises(StoreAwayError, match="does not answer"):
                await one.keep_alive(lease, b"load")
            await asyncio.sleep(4.3)  # longer than the lease
            await asyncio.to_thread(server.start)
            for store in (one, other):
                await until(store, lambda store=store: store.state is not None)  # type: ignore[misc]
                assert store.state is not None
                assert store.state.revision == revision, "something happened"
                assert held(store) == {block(1)}
            assert await other.keep_alive(lease, b"load") == 4.0
            assert await other.publish_blocks(lease, 2, [Stored(block(2))]) == 3


async def test_a_store_that_hangs_ends_no_lease(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        async with opened(server.url, 2) as (one, other):
            lease, _ = await one.register(worker(), 2.5)
            revision = one.state.revision if one.state else 0
            server.pause()
            try:
                await until(one, lambda: one.state is None)
                await until(other, lambda: other.state is None)
            finally:
                server.resume()
            for store in (one, other):
                await until(store, lambda store=store: store.state is not None)  # type: ignore[misc]
                assert store.state is not None
                assert store.state.revision == revision
            assert await one.keep_alive(lease, b"load") == 2.5


async def test_what_a_crash_loses_nobody_keeps(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        async with opened(server.url, 2) as (one, other):
            lease, _ = await one.register(worker(), 60)
            await one.publish_blocks(lease, 1, [Stored(block(1))])
            with server.client() as client:
                client.save()
            await one.publish_blocks(lease, 2, [Stored(block(2)), Stored(block(3))])
            lost, _ = await one.register(worker("late"), 60)
            seen = one.state.revision if one.state else 0
            server.kill()
            await asyncio.to_thread(server.start)
            for store in (one, other):
                await until(store, lambda store=store: store.state is not None and "late" not in store.state.workers)  # type: ignore[misc]
                assert held(store) == {block(1)}
            with pytest.raises(UnknownLeaseError):
                await other.keep_alive(lost, b"load")
            with pytest.raises(SequenceGapError):
                await other.publish_blocks(lease, 4, [Stored(block(4))])
            assert await other.publish_blocks(lease, 4, [Cleared(), Stored(block(4))]) == 6
            assert other.state is not None
            assert other.state.revision > seen, "a revision came twice"
            # Whoever saw what is lost is told all anew.
            async with aclosing(one.watch(seen, 0.2)) as watch:
                assert (await next_events(watch)).snapshot


async def test_a_crash_that_loses_all_leaves_nothing(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        async with opened(server.url) as (store,):
            lease, _ = await store.register(worker(), 60)
            seen = store.state.revision if store.state else 0
            server.kill()
            await asyncio.to_thread(server.start)
            await until(store, lambda: store.state is not None and not store.state.workers)
            assert store.state is not None
            assert store.state.revision > seen
            with pytest.raises(UnknownLeaseError):
                await store.publish_blocks(lease, 2, [])


async def test_a_store_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    async with new_store(server.url) as store:
        availability = store.availability()
        assert await anext(availability) is False
        with pytest.raises(StoreAwayError, match=f"127.0.0.1:{server.port}"):
            await store.register(worker(), 60)
        with pytest.raises(StoreAwayError):
            await anext(store.watch(0, 1.0))
        with server:
            async with asyncio.timeout(10):
                assert await anext(availability) is True
            await store.register(worker(), 60)
        await availability.aclose()


async def test_a_password_opens_and_is_not_told(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--requirepass", "open sesame")
    await asyncio.to_thread(server.start, password="open sesame")
    with structlog.testing.capture_logs() as lines:
        try:
            for url in (server.url, server.url.replace("://", "://:swordfish@")):
                with pytest.raises(StoreRefusedError, match="check the user, the password") as refused:
                    async with new_store(url):
                        pass
                assert "swordfish" not in str(refused.value)
            async with opened(server.url, password="open sesame"):
                pass
            async with opened(server.url.replace("://", "://:open%20sesame@")):
                pass
        finally:
            server.kill()
    assert any(line["event"] == "serving from the store" for line in lines)
    assert "sesame" not in str(lines)
    assert without_password("rediss://me:secret@h:1/2?password=secret") == "rediss://h:1/2"


async def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate))  # fmt: skip
    await asyncio.to_thread(subprocess.run, made, check=True, capture_output=True, timeout=60)
    with RedisServer(tmp_path, tls=(certificate, key)) as server:
        async with opened(server.url) as (store,):
            await store.register(worker(), 60)
        async with new_store(server.url.partition("?")[0]) as store:
            with pytest.raises(StoreAwayError, match="certificate verify failed"):
                await store.register(worker(), 60)
