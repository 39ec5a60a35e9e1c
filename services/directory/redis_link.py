"""What the store in Redis (or Valkey) says and is asked, in this package's terms; no rules and no order of events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import redis.asyncio
import redis.exceptions
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvferry.api.directory.v1 import directory_pb2
from kvferry.errors import InvalidRequestError
from services.directory.events import (
    BlockChange,
    BlocksChanged,
    Cleared,
    Event,
    Joined,
    LeaveReason,
    Left,
    LoadChanged,
    Role,
    Stored,
    Worker,
)
from services.directory.replica import Entry
from services.directory.store import StoreAwayError
from services.directory.wire import to_block_event, to_change

_log = structlog.stdlib.get_logger(__name__)

_PREFIX: Final = "kvferry:"
_RULES = Path(__file__).with_name("rules.lua")
_CONNECT_TIMEOUT_S = 2.0
# Of an answer.  A silent connection is given up before a lease of the default length runs out.
_ANSWER_TIMEOUT_S = 3.0
_MAX_CONNECTIONS = 32
_MAX_LOG_NBYTES = 64 << 20
# A worker's account of its blocks is begun anew, from a snapshot, when it says this much of removed ones, and more than of
# those still there.
_MIN_REMOVED_NBYTES = 4 << 20
MAX_CHANGES = 1000
# At most a mebibyte each, as workers send them; of small ones more are read at once.
_READ_ENTRIES, _MAX_READ_ENTRIES, _READ_NBYTES = 32, 1024, 1 << 20


class StoreRefusedError(StoreAwayError):
    """The store answers, and lets nobody in with this password."""


class RedisLink:
    """Calls raise StoreAwayError for all that keeps the store from answering.  Each has a deadline."""

    def __init__(self, url: str, *, password: str | None = None, max_events: int) -> None:
        """Raises ValueError for what is no URL."""
        self.shown_url = without_password(url)
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            **({} if password is None else {"password": password}),
            max_connections=_MAX_CONNECTIONS,
            timeout=_ANSWER_TIMEOUT_S,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            socket_timeout=_ANSWER_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            client_name="kvferry-directory",
            protocol=2,
        )
        self._client = redis.asyncio.Redis.from_pool(pool)
        self._rules = self._client.register_script(_RULES.read_text(encoding="utf-8"))
        self._limits = (max_events, _MAX_LOG_NBYTES)

    async def close(self) -> None:
        await self._client.aclose()

    async def look(self) -> int:
        """Ends the leases that ran out; returns how many.  Whoever serves calls this every half second."""
        return int((await self._call("look"))[1])

    async def life(self) -> str:
        """Of the server: it ends with its process, and where another one takes over."""
        with self._translated():
            server = await self._client.info("server")
        return str(server["run_id"])

    async def head(self) -> int:
        """Revision of the log's last entry."""
        with self._translated():
            found = await self._client.get(f"{_PREFIX}head")
        return int(found or 0)

    async def workers(self) -> tuple[int, list[Worker]]:
        """Of one moment, with the log's head."""
        _, head, *values = await self._call("workers")
        found = zip(*(values[i::5] for i in range(5)), strict=True)
        return int(head), [_worker(*fields) for fields in found]

    async def blocks(self, worker_id: str) -> AsyncIterator[list[BlockChange]]:
        """The account of the worker's blocks, part by part, not all of one moment."""
        start, count = 0, _READ_ENTRIES
        while True:
            with self._translated():
                parts: Any = await self._client.lrange(f"{_PREFIX}blocks:{worker_id}", start, start + count - 1)
            for part in parts:
                yield _changes(part)
            if len(parts) < count:
                return
            start += len(parts)
            count = min(max(_READ_NBYTES * len(parts) // sum(map(len, parts)), _READ_ENTRIES), _MAX_READ_ENTRIES)

    async def entries_after(self, revision: int, wait_s: float) -> list[Entry]:
        """Those that the log has, oldest first, not necessarily all; waits ``wait_s`` for the first one."""
        with self._translated():
            found: Any = await self._client.xread(
                {f"{_PREFIX}log": f"{revision}-0"}, count=_READ_ENTRIES, block=round(wait_s * 1000) or None
            )
        return [_entry(name, fields) for _, entries in found for name, fields in entries]

    async def register(self, worker: Worker, ttl_s: float, lease_id: int) -> list[Any]:
        return await self._call(
            "register", worker.worker_id, worker.incarnation, worker.role.value, worker.info, worker.load,
            round(ttl_s * 1000), lease_id,
        )  # fmt: skip

    async def keep_alive(self, lease_id: int, load: bytes) -> list[Any]:
        return await self._call("keep_alive", lease_id, load)

    async def deregister(self, lease_id: int) -> list[Any]:
        return await self._call("deregister", lease_id)

    async def publish(self, lease_id: int, first_sequence: int, changes: Sequence[BlockChange]) -> list[Any]:
        """At most ``MAX_CHANGES``."""
        assert len(changes) <= MAX_CHANGES
        kinds = "".join(map(_kind, changes))
        encoded = (directory_pb2.BlocksChanged(events=[to_block_event(c)]).SerializeToString() for c in changes)
        return await self._call("publish", lease_id, first_sequence, _MIN_REMOVED_NBYTES, kinds, *encoded)

    async def check_policy(self) -> None:
        """Says so when the store may forget what it holds."""
        with self._translated():
            memory = await self._client.info("memory")
        policy = memory.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            _log.error(
                "the store may drop keys when its memory is full; set maxmemory-policy noeviction", policy=policy
            )

    async def _call(self, action: str, *arguments: str | bytes | int) -> list[Any]:
        with self._translated():
            answer: list[Any] = await self._rules(keys=[_PREFIX], args=[action, *self._limits, *arguments])
        return answer

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise StoreRefusedError(
                f"the store at {self.shown_url} refuses this directory ({error}); "
                "check the user, the password and what it may do"
            ) from error
        except (redis.exceptions.RedisError, OSError, TimeoutError) as error:
            raise StoreAwayError(
                f"the store at {self.shown_url} does not answer: {error or type(error).__name__}"
            ) from error


def without_password(url: str) -> str:
    """For people and logs: neither the password nor the options, which may hold one too."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _kind(change: BlockChange) -> str:
    match change:
        case Cleared():
            return "c"
        case Stored():
            return "s"
        case _:
            return "r"


def _worker(worker_id: bytes, incarnation: bytes, role: bytes, info: bytes, load: bytes) -> Worker:
    return Worker(worker_id.decode(), int(incarnation), Role(role.decode()), info, load)


def _changes(data: bytes) -> list[BlockChange]:
    """Without what this version does not know."""
    found = []
    for event in directory_pb2.BlocksChanged.FromString(data).events:
        with contextlib.suppress(InvalidRequestError):
            found.append(to_change(event))
    return found


def _entry(name: bytes, fields: dict[bytes, bytes]) -> Entry:
    return Entry(int(fields[b"previous"]), int(name.partition(b"-")[0]), tuple(_events(fields)))


def _events(fields: dict[bytes, bytes]) -> Iterator[Event]:
    worker_id, incarnation = fields[b"worker"], fields[b"incarnation"]
    match fields[b"kind"]:
        case b"joined":
            yield Joined(_worker(worker_id, incarnation, fields[b"role"], fields[b"info"], fields[b"load"]))
        case b"left":
            yield Left(worker_id.decode(), int(incarnation), LeaveReason(fields[b"reason"].decode()))
        case b"load":
            yield LoadChanged(worker_id.decode(), int(incarnation), fields[b"load"])
        case b"blocks":
            yield BlocksChanged(worker_id.decode(), int(incarnation), tuple(_changes(fields[b"changes"])))
