"""A cluster of any size, as its directory and its gateways know it: real messages through the real cores."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

from gateway.candidates import Candidate
from gateway.pending import PendingBook
from gateway.view import ClusterView
from gateway.worker_state import seen_now
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from services.directory import events
from services.directory.core import Directory
from services.directory.index import Prefix
from services.directory.servicer import _response
from services.directory.state import ClusterState
from services.directory.watching import Changes, split

NUM_BLOCKS, BLOCK_SIZE = 256, 16  # of the prompt that everybody has some of
WORKERS_OF_A_RACK, RACKS_OF_A_ZONE = 16, 16
_NO_PREFIX = Prefix(0, 0)


def info(number: int) -> directory_pb2.WorkerInfo:
    """Every second worker is for prefill."""
    rack = number // WORKERS_OF_A_RACK
    role = common_pb2.WORKER_ROLE_PREFILL if number % 2 else common_pb2.WORKER_ROLE_DECODE
    worker = directory_pb2.WorkerInfo(
        worker_id=f"worker-{number:05}", incarnation=number + 1, role=role, control_address=f"10.0.0.1:{number}"
    )
    worker.model.revision = "r"
    worker.layout.content_fingerprint = worker.layout.fingerprint = "f"
    worker.layout.block_size_tokens, worker.layout.block_nbytes = BLOCK_SIZE, 1 << 16
    worker.labels.update(host=f"h{number}", rack=f"r{rack}", zone=f"z{rack // RACKS_OF_A_ZONE}")
    return worker


def load(number: int, turn: int = 0) -> directory_pb2.WorkerLoad:
    """As a worker reports it that has been busy; all differ."""
    odd = (number * 7919 + turn) % 97
    return directory_pb2.WorkerLoad(
        blocks=common_pb2.BlockCounts(free=1000 + odd, cached=5000, active=1000), num_running=odd % 16,
        num_queued_prefill_tokens=odd * 64, prefill_tokens_per_s=8000.0 + odd, decode_step_base_s=0.01,
        decode_step_per_sequence_s=0.0001, transfer_bytes_per_s=1e10, transfer_round_trip_s=0.0005,
    )  # fmt: skip


@dataclass(slots=True)
class Cluster:
    """One directory's core and one gateway's view, of ``num_workers``."""

    num_workers: int
    state: ClusterState = field(default_factory=lambda: ClusterState(1, max_events=100_000))
    view: ClusterView = field(default_factory=ClusterView)
    pending: PendingBook = field(default_factory=lambda: PendingBook(time.monotonic))
    leases: list[int] = field(default_factory=list)
    directory: Directory = field(init=False)

    def __post_init__(self) -> None:
        self.directory = Directory(self.state, itertools.count(1))
        prefix = self.prompt
        for number in range(self.num_workers):
            about = info(number)
            role = events.Role.PREFILL if number % 2 else events.Role.DECODE
            worker = events.Worker(
                about.worker_id, about.incarnation, role, about.SerializeToString(), load(number).SerializeToString()
            )
            self.leases.append(self.directory.register(worker, 6.0, 0.0))
            share = 1 + number % NUM_BLOCKS
            self.directory.publish_blocks(self.leases[-1], 1, [events.Stored(prefix[: share * 16])], 0.0)
        for response in self.snapshot():
            self.view.apply(directory_pb2.WatchResponse.FromString(response))

    @property
    def prompt(self) -> bytes:
        """Hashes of its blocks; worker ``n`` has the first ``1 + n % NUM_BLOCKS`` of them."""
        return b"".join(number.to_bytes(16, "big") for number in range(NUM_BLOCKS))

    def snapshot(self) -> list[bytes]:
        """What a watcher that comes anew is sent."""
        return self._told(self.state.snapshot(), is_snapshot=True)

    def keep_alive(self, number: int, turn: int) -> None:
        """What a worker says every two seconds."""
        request = directory_pb2.KeepAliveRequest.FromString(
            directory_pb2.KeepAliveRequest(lease_id=self.leases[number], load=load(number, turn)).SerializeToString()
        )
        self.directory.keep_alive(request.lease_id, request.load.SerializeToString(deterministic=True), 0.0)

    def store_blocks(self, sequence: int) -> None:
        """What the first worker says when it has computed as many blocks as the prompt has, for the ``sequence``th time."""
        new = b"".join((sequence << 64 | number).to_bytes(16, "big") for number in range(NUM_BLOCKS))
        self.directory.publish_blocks(self.leases[0], sequence, [events.Stored(new)], 0.0)

    def news(self, revision: int) -> list[bytes]:
        """What one watcher is sent of all that came after ``revision``."""
        happened = self.state.events_since(revision)
        assert happened is not None
        return self._told(happened, is_snapshot=False)

    def candidates(self) -> list[Candidate]:
        """What a gateway makes of its view for each request."""
        prefixes = self.view.longest_prefix([self.prompt])
        return [
            seen_now(
                seen,
                prefixes.get(seen.key.worker_id, _NO_PREFIX),
                self.pending.there(seen.key, seen.num_requests, seen.num_queued_prefill_tokens),
            )
            for seen in map(self.view.candidate, self.view.workers)
        ]

    def _told(self, happened: list[events.Event], *, is_snapshot: bool) -> list[bytes]:
        parts: list[Changes] = split(happened, self.state.revision, is_snapshot)
        return [_response(part).SerializeToString() for part in parts]
