"""The gateway's own picture of the cluster, kept fresh by the directory's watch stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

import grpc
import structlog

from gateway.candidates import Abilities, Candidate, Path, WorkerKey
from gateway.worker_state import to_candidate
from kvferry.api.directory.v1 import directory_pb2
from services.directory.index import DEFAULT_MAX_ENTRIES, HASH_NBYTES, BlockIndex, Prefix
from services.runtime.backoff import Backoff
from services.runtime.directories import Directories
from services.runtime.place import Place
from services.runtime.protocol import Protocol
from services.runtime.tier import Tier
from services.runtime.tls import Certificates

_log = structlog.stdlib.get_logger(__name__)

# The directory gives a sign of life every 2 s.
_SILENCE_S = 6.0
_SAID_AGAIN_S = 30.0
# Of one step of a response, which the event loop waits for; a call for few costs as much as one for some more.
_STEP_HASHES = 2048
_CALL_HASHES = 16

_PATH_KINDS: dict[int, str] = {
    directory_pb2.PATH_KIND_SHARED_MEMORY: "shared memory",
    directory_pb2.PATH_KIND_TCP: "tcp",
    directory_pb2.PATH_KIND_RDMA: "RDMA",
}


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    state: directory_pb2.WorkerState


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """``reason`` is unspecified when the directory no longer remembers it."""

    worker_id: str
    incarnation: int
    reason: directory_pb2.LeaveReason.ValueType


Change = WorkerJoined | WorkerGone


class ClusterView:
    """Who is alive and who holds which blocks, as of the last response applied.

    A directory that restarts knows nobody at first, and its workers need a moment to return.  So workers that a snapshot
    lacks are kept, with their blocks, for ``grace_s`` more seconds.  ``clock`` is any monotonic one, in seconds.
    Not thread-safe.  What the properties return is to be read, not changed.
    """

    def __init__(
        self,
        *,
        grace_s: float = 10.0,
        max_index_entries: int = DEFAULT_MAX_ENTRIES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._workers: dict[str, directory_pb2.WorkerState] = {}
        self._abilities: dict[str, Abilities] = {}
        self._places: dict[str, Place] = {}
        self._candidates: dict[str, Candidate] = {}  # of those that were asked for since they last reported
        self._index = BlockIndex(max_entries=max_index_entries)
        self._revision = 0
        self._heard_s: float | None = None
        self._unconfirmed: set[str] = set()
        self._unconfirmed_until_s = 0.0
        # Told of each worker that has reported its load; must not raise.
        self.on_report: Callable[[WorkerKey], None] = lambda _: None

    @property
    def workers(self) -> Mapping[str, directory_pb2.WorkerState]:
        """By worker_id."""
        return MappingProxyType(self._workers)

    def abilities(self, worker_id: str) -> Abilities:
        """Of a worker that is there."""
        return self._abilities[worker_id]

    def place(self, worker_id: str) -> Place:
        """Of a worker that is there."""
        return self._places[worker_id]

    def has(self, key: WorkerKey) -> bool:
        return self._present(key.worker_id, key.incarnation) is not None

    def candidate(self, worker_id: str) -> Candidate:
        """A worker that is there, as ``to_candidate`` makes it: the same object until it reports again."""
        candidate = self._candidates.get(worker_id)
        if candidate is None:
            state = self._workers[worker_id]
            candidate = to_candidate(state, self._abilities[worker_id], self._places[worker_id])
            self._candidates[worker_id] = candidate
        return candidate

    @property
    def revision(self) -> int:
        """Where a watch may resume; 0 asks for a snapshot."""
        return self._revision

    @property
    def age_s(self) -> float:
        """Seconds since the directory was last heard from; infinite before the first time."""
        return float("inf") if self._heard_s is None else self._clock() - self._heard_s

    @property
    def index(self) -> BlockIndex:
        return self._index

    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, Prefix]:
        """For each worker that holds the chain's first block, how many leading blocks it holds."""
        return self._index.longest_prefix(b"".join(hashes))

    def num_blocks(self, worker_id: str) -> int:
        """How many blocks the worker's prefix cache holds."""
        return self._index.num_blocks(worker_id)

    def apply(self, response: directory_pb2.WatchResponse) -> list[Change]:
        """Returns who came and went, in order.  Block and load changes are not mentioned; neither is a worker that
        registered again as the same incarnation."""
        return list(chain.from_iterable(self.apply_in_steps(response)))

    def apply_in_steps(self, response: directory_pb2.WatchResponse) -> Iterator[list[Change]]:
        """As ``apply``, but a step takes no more than about a millisecond, however many blocks there are.  Only a response
        that was applied to its end counts for ``revision``; applied again it does no harm."""
        now_s = self._clock()
        self._heard_s = now_s
        changes: list[Change] = []
        cost = 0
        if response.snapshot:
            self._unconfirmed = set(self._workers)
            self._unconfirmed_until_s = now_s + self._grace_s
        for event in response.events:
            match event.WhichOneof("event"):
                case "joined":
                    changes += self._join(event.joined)
                case "left":
                    changes += self._leave(event.left.worker_id, event.left.incarnation, event.left.reason)
                case "load":
                    if (state := self._present(event.load.worker_id, event.load.incarnation)) is not None:
                        state.load.CopyFrom(event.load.load)
                        self._candidates.pop(event.load.worker_id, None)
                        self.on_report(WorkerKey(event.load.worker_id, event.load.incarnation))
                case "blocks":
                    if self._present(event.blocks.worker_id, event.blocks.incarnation) is not None:
                        for num_hashes in self._apply_blocks(event.blocks):
                            cost += num_hashes + _CALL_HASHES
                            if cost >= _STEP_HASHES:
                                yield changes
                                changes, cost = [], 0
        if response.revision or response.snapshot:
            self._revision = response.revision
        if self._unconfirmed and now_s >= self._unconfirmed_until_s:
            for worker_id in sorted(self._unconfirmed):
                incarnation = self._workers[worker_id].info.incarnation
                changes += self._leave(worker_id, incarnation, directory_pb2.LEAVE_REASON_UNSPECIFIED)
        yield changes

    def check_integrity(self) -> None:
        """Raises AssertionError when blocks or grace belong to a worker that is not there."""
        self._index.check_integrity()
        assert set(self._index.num_blocks_by_worker()) <= set(self._workers)
        assert self._unconfirmed <= set(self._workers)
        assert set(self._abilities) == set(self._places) == set(self._workers)
        for worker_id, candidate in self._candidates.items():
            state = self._workers[worker_id]
            assert candidate == to_candidate(state, self._abilities[worker_id], self._places[worker_id])

    def _present(self, worker_id: str, incarnation: int) -> directory_pb2.WorkerState | None:
        state = self._workers.get(worker_id)
        return state if state is not None and state.info.incarnation == incarnation else None

    def _join(self, joined: directory_pb2.WorkerState) -> list[Change]:
        worker_id, incarnation = joined.info.worker_id, joined.info.incarnation
        state = directory_pb2.WorkerState()
        state.CopyFrom(joined)
        changes: list[Change] = []
        known = self._workers.get(worker_id)
        if known is not None and known.info.incarnation != incarnation:
            changes += self._leave(worker_id, known.info.incarnation, directory_pb2.LEAVE_REASON_REPLACED)
        if known is None or known.info.incarnation != incarnation:
            changes.append(WorkerJoined(state))
        self._workers[worker_id] = state
        self._abilities[worker_id] = _abilities(joined.info)
        self._places[worker_id] = Place.of(joined.info.labels)
        self._candidates.pop(worker_id, None)
        self._unconfirmed.discard(worker_id)
        # Its blocks follow.
        self._index.cleared(worker_id)
        self.on_report(WorkerKey(worker_id, incarnation))
        return changes

    def _leave(self, worker_id: str, incarnation: int, reason: directory_pb2.LeaveReason.ValueType) -> list[Change]:
        if self._present(worker_id, incarnation) is None:
            return []
        del self._workers[worker_id]
        del self._abilities[worker_id]
        del self._places[worker_id]
        self._candidates.pop(worker_id, None)
        self._unconfirmed.discard(worker_id)
        self._index.cleared(worker_id)
        return [WorkerGone(worker_id, incarnation, reason)]

    def _apply_blocks(self, blocks: directory_pb2.BlocksChanged) -> Iterator[int]:
        """Yields how many hashes a part had, after each.  A tier that is not known here is left out."""
        for event in blocks.events:
            tier = Tier.of(event.tier)
            kind = event.WhichOneof("event")
            if kind == "cleared":
                self._index.cleared(blocks.worker_id)
                yield 0
            elif tier is not None and kind is not None:
                change = self._index.stored if kind == "stored" else self._index.removed
                hashes = event.stored or event.removed
                for start in range(0, len(hashes), _STEP_HASHES * HASH_NBYTES):
                    part = hashes[start : start + _STEP_HASHES * HASH_NBYTES]
                    change(blocks.worker_id, part, tier)
                    yield len(part) // HASH_NBYTES


async def watch(
    view: ClusterView,
    directory_addresses: tuple[str, ...],
    *,
    on_change: Callable[[list[Change]], None] | None = None,
    certificates: Certificates | None = None,
) -> None:
    """Keeps ``view`` fresh until cancelled: follows one of the directories, resumes where it was after a loss, at another
    if there are several, and tries again for ever with a capped backoff; meanwhile the log says now and then how old the
    view is.  ``on_change`` hears who came and went and must not raise or block."""
    backoff = Backoff()
    async with Directories(directory_addresses, certificates=certificates) as directories:
        said_s: float | None = None  # when the log last said that the directory is lost
        while True:
            directory = directories.current
            call = directory.stub.Watch(directory_pb2.WatchRequest(from_revision=view.revision))
            try:
                while True:
                    async with asyncio.timeout(_SILENCE_S):
                        response = await call.read()
                    if not isinstance(response, directory_pb2.WatchResponse):
                        raise ConnectionError("the directory ended the watch")
                    if said_s is not None:
                        said_s = None
                        age_s = _told(view.age_s)
                        _log.info("watching the directory again", directory=directory.address, view_age_s=age_s)
                    backoff.reset()
                    for changes in view.apply_in_steps(response):
                        for change in changes:
                            _log_change(change)
                        if changes and on_change is not None:
                            on_change(changes)
                        await asyncio.sleep(0)  # the requests' turn
            except (grpc.aio.AioRpcError, TimeoutError, ConnectionError) as error:
                directories.move_on(directory)
                now_s = time.monotonic()
                if said_s is None or now_s - said_s >= _SAID_AGAIN_S:
                    said_s = now_s
                    reason = error.code().name if isinstance(error, grpc.aio.AioRpcError) else str(error) or "silence"
                    _log.warning(
                        "lost the directory; the view grows old",
                        directory=directory.address, reason=reason, view_age_s=_told(view.age_s),
                    )  # fmt: skip
            finally:
                call.cancel()
            await asyncio.sleep(backoff.next_s())


def _abilities(info: directory_pb2.WorkerInfo) -> Abilities:
    paths = frozenset(Path(_PATH_KINDS.get(path.kind, f"kind {path.kind}"), path.scope) for path in info.paths)
    return Abilities(Protocol.said(info.oldest_protocol, info.newest_protocol), paths or None)


def _told(age_s: float) -> float | None:
    """None before the directory was first heard."""
    return None if age_s == float("inf") else round(age_s, 1)


def _log_change(change: Change) -> None:
    if isinstance(change, WorkerJoined):
        info = change.state.info
        _log.info("worker joined", worker_id=info.worker_id, incarnation=info.incarnation, at=info.control_address)
    else:
        reason = directory_pb2.LeaveReason.Name(change.reason)
        _log.info("worker gone", worker_id=change.worker_id, incarnation=change.incarnation, reason=reason)
