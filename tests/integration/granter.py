"""A worker that grants pins on memory full of what was never computed, and then behaves as it is told to.

Within the test's process, but with the real protocol and a real region, which pullers map and read.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum, auto
from threading import Event
from typing import Any

import grpc

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.engine.hashing import HASH_NBYTES
from transport import Region, create

ID, INCARNATION = "granter", 7
ANSWER_S = 20.0


class Manner(Enum):
    REFUSES = auto()
    HOLDS_NOTHING = auto()
    SAYS_NOTHING = auto()
    HAS_OTHER_BLOCKS = auto()
    POINTS_OUTSIDE = auto()
    REPEATS_A_BLOCK = auto()
    GIVES_UP_THE_POOL = auto()
    DID_NOT_HOLD = auto()
    LEASE_ENDS_FIRST = auto()  # and it says nothing at the release


class Granter(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, region: Region, layout: common_pb2.Layout) -> None:
        self.manner = Manner.REFUSES
        self.num_asked = self.num_released = 0
        self.closing = Event()
        self._region, self._layout = region, layout

    def PinBlocks(self, request: worker_pb2.PinBlocksRequest, context: Any) -> worker_pb2.PinBlocksResponse:
        self.num_asked += 1
        num_blocks = len(request.hashes) // HASH_NBYTES
        response = worker_pb2.PinBlocksResponse(owner_incarnation=INCARNATION)
        if self.manner is Manner.REFUSES:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "all is pinned")
        if self.manner is Manner.SAYS_NOTHING:
            self.closing.wait(ANSWER_S)
        if self.manner is Manner.HOLDS_NOTHING:
            return response
        response.pin_id = "pin"
        response.blocks.extend(range(num_blocks))
        if self.manner is Manner.POINTS_OUTSIDE:
            response.blocks[-1] = 10**6
        if self.manner is Manner.REPEATS_A_BLOCK:
            response.blocks[-1] = 0
        response.region = self._region.descriptor
        response.layout.CopyFrom(self._layout)
        if self.manner is Manner.HAS_OTHER_BLOCKS:
            response.layout.fingerprint = "another"
        if self.manner is Manner.GIVES_UP_THE_POOL:
            self._region.release()
        response.expires_in_ms = 1 if self.manner is Manner.LEASE_ENDS_FIRST else 20_000
        return response

    def ReleasePin(self, request: worker_pb2.ReleasePinRequest, context: Any) -> worker_pb2.ReleasePinResponse:
        self.num_released += 1
        if self.manner is Manner.LEASE_ENDS_FIRST:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        return worker_pb2.ReleasePinResponse(held=False)


@contextmanager
def granting(layout: common_pb2.Layout, num_blocks: int) -> Iterator[tuple[Granter, str]]:
    """With the address."""
    with create("ucx") as transport, transport.allocate(num_blocks * layout.block_nbytes) as region:
        region.view[:] = b"\x3f" * region.nbytes  # numbers, and no KV of any prompt
        granter = Granter(region, layout)
        server = grpc.server(ThreadPoolExecutor(8))
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(granter, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield granter, f"127.0.0.1:{port}"
        finally:
            granter.closing.set()
            server.stop(0).wait(10)
