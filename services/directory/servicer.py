"""kvferry.api.directory.v1 in terms of the store; translation only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from kvferry import errors
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2, directory_pb2_grpc
from services.directory import core, events
from services.directory.store import Store, StoreAwayError
from services.directory.watching import Changes
from services.directory.wire import to_block_event, to_change

MIN_LEASE_TTL_MS = 1_000
MAX_LEASE_TTL_MS = 300_000
# Watchers may rely on 2 s; the difference is for the way.
_HEARTBEAT_S = 1.5
_AWAY_RETRY_S = 0.5

_ROLES = {
    common_pb2.WORKER_ROLE_PREFILL: events.Role.PREFILL,
    common_pb2.WORKER_ROLE_DECODE: events.Role.DECODE,
}
_REASONS = {
    events.LeaveReason.DEREGISTERED: directory_pb2.LEAVE_REASON_DEREGISTERED,
    events.LeaveReason.EXPIRED: directory_pb2.LEAVE_REASON_EXPIRED,
    events.LeaveReason.REPLACED: directory_pb2.LEAVE_REASON_REPLACED,
}


class DirectoryServicer(directory_pb2_grpc.DirectoryServiceServicer):
    def __init__(self, store: Store) -> None:
        self._store = store

    async def Register(self, request: directory_pb2.RegisterRequest, context: Any) -> directory_pb2.RegisterResponse:
        worker = _worker(request)
        with _translated():
            lease_id, revision = await self._store.register(worker, request.lease_ttl_ms / 1000)
        return directory_pb2.RegisterResponse(lease_id=lease_id, revision=revision)

    async def KeepAlive(self, request: directory_pb2.KeepAliveRequest, context: Any) -> directory_pb2.KeepAliveResponse:
        with _translated():
            ttl_s = await self._store.keep_alive(request.lease_id, _encode(request.load))
        return directory_pb2.KeepAliveResponse(lease_ttl_ms=round(ttl_s * 1000))

    async def Deregister(
        self, request: directory_pb2.DeregisterRequest, context: Any
    ) -> directory_pb2.DeregisterResponse:
        with _translated():
            await self._store.deregister(request.lease_id)
        return directory_pb2.DeregisterResponse()

    async def Watch(
        self, request: directory_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[directory_pb2.WatchResponse]:
        with _translated():
            async with aclosing(self._store.watch(request.from_revision, _HEARTBEAT_S)) as watch:
                async for changes in watch:
                    yield _response(changes)

    async def PublishBlocks(
        self, request: directory_pb2.PublishBlocksRequest, context: Any
    ) -> directory_pb2.PublishBlocksResponse:
        if request.first_sequence == 0:
            raise errors.InvalidRequestError("first_sequence must be 1 or more")
        changes = [to_change(event) for event in request.events]
        with _translated():
            following = await self._store.publish_blocks(request.lease_id, request.first_sequence, changes)
        return directory_pb2.PublishBlocksResponse(next_sequence=following)

    async def Lookup(self, request: directory_pb2.LookupRequest, context: Any) -> directory_pb2.LookupResponse:
        with _translated():
            matches = await self._store.longest_prefix(request.hashes)
        return directory_pb2.LookupResponse(
            matches=[
                directory_pb2.PrefixMatch(
                    worker_id=worker.worker_id,
                    incarnation=worker.incarnation,
                    num_blocks=prefix.num_blocks,
                    num_device_blocks=prefix.num_device_blocks,
                )
                for worker, prefix in matches
            ]
        )


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except core.UnknownLeaseError as error:
        raise errors.NotFoundError(str(error), reason="LEASE_ENDED") from error
    except core.ReplacedError as error:
        raise errors.ConflictError(str(error), reason="REPLACED") from error
    except core.IncarnationReusedError as error:
        raise errors.ConflictError(str(error), reason="INCARNATION_REUSED") from error
    except core.SequenceGapError as error:
        raise errors.ConflictError(str(error), reason="SEQUENCE_GAP") from error
    except core.SnapshotWantedError as error:
        raise errors.ConflictError(str(error), reason="SNAPSHOT_WANTED") from error
    except StoreAwayError as error:
        raise errors.UnavailableError(str(error), reason="STORE_AWAY", retry_after_s=_AWAY_RETRY_S) from error
    except ValueError as error:
        raise errors.InvalidRequestError(str(error)) from error


def _worker(request: directory_pb2.RegisterRequest) -> events.Worker:
    info = request.info
    for name in ("worker_id", "incarnation", "control_address"):
        if not getattr(info, name):
            raise errors.InvalidRequestError(f"info.{name} must be set")
    role = _ROLES.get(info.role)
    if role is None:
        raise errors.InvalidRequestError("info.role must be prefill or decode")
    if not MIN_LEASE_TTL_MS <= request.lease_ttl_ms <= MAX_LEASE_TTL_MS:
        raise errors.InvalidRequestError(
            f"lease_ttl_ms must be from {MIN_LEASE_TTL_MS} to {MAX_LEASE_TTL_MS}, not {request.lease_ttl_ms}"
        )
    return events.Worker(info.worker_id, info.incarnation, role, _encode(info), _encode(request.load))


def _encode(message: directory_pb2.WorkerInfo | directory_pb2.WorkerLoad) -> bytes:
    # Equal descriptions must give equal bytes.
    return message.SerializeToString(deterministic=True)


def _response(changes: Changes) -> directory_pb2.WatchResponse:
    return directory_pb2.WatchResponse(
        revision=changes.revision, events=_events(changes.events), snapshot=changes.snapshot
    )


def _events(happened: Sequence[events.Event]) -> Iterator[directory_pb2.Event]:
    for event in happened:
        match event:
            case events.Joined(worker):
                yield directory_pb2.Event(
                    joined=directory_pb2.WorkerState(
                        info=directory_pb2.WorkerInfo.FromString(worker.info),
                        load=directory_pb2.WorkerLoad.FromString(worker.load),
                    )
                )
            case events.Left(worker_id, incarnation, reason):
                yield directory_pb2.Event(
                    left=directory_pb2.WorkerLeft(worker_id=worker_id, incarnation=incarnation, reason=_REASONS[reason])
                )
            case events.LoadChanged(worker_id, incarnation, load):
                yield directory_pb2.Event(
                    load=directory_pb2.WorkerLoadChanged(
                        worker_id=worker_id, incarnation=incarnation, load=directory_pb2.WorkerLoad.FromString(load)
                    )
                )
            case events.BlocksChanged(worker_id, incarnation, block_changes):
                yield directory_pb2.Event(
                    blocks=directory_pb2.BlocksChanged(
                        worker_id=worker_id, incarnation=incarnation, events=map(to_block_event, block_changes)
                    )
                )
