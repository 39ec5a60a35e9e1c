"""A peer that speaks the protocol and keeps to it only when told to: a process of its own, with its own transport.

It obeys lines on its standard input and answers each with one line of JSON.  As a writer it uses tickets that were given
in its name, as an owner it lends blocks of its own pool; its pool also holds the KV that it writes.

What holds, whatever such a peer does: nobody gets a block that was lent to it before it has said that it stopped, or its
process has ended, and what was sent has arrived.  So a peer that hangs, dies, restarts, is late, writes half, or writes
on and on harms nobody.  Its word is believed: of a peer that says that it has stopped and writes on, or that commits
while it writes, the bytes land in blocks with a new owner, and no accounting can prevent that, for it has the pool
mapped.  Verification promises one thing against it: damage that is there when a transfer into the damaged block is
committed is noticed before a token is decoded from it.  Damage that comes later, or in blocks which the owner computed
itself, is not; neither is KV that is wrong in the writer's own memory, whose digests are its word as well.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import xxhash
from google.protobuf.json_format import MessageToDict

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import from_rpc_error
from services.engine.digest import digest_blocks
from services.engine.layout import KvLayout
from services.runtime.process import this_process
from transport import Op, RemoteRegion, Transport, TransportError, create

Context = grpc.ServicerContext
PAUSE_S = 0.002  # between two passes over the same blocks: the machine has others to serve


class Writing:
    """Writes the same blocks over and over until it is told to stop."""

    def __init__(self, peer: Hostile, ticket: worker_pb2.Ticket, slots: list[int], blocks: list[int]) -> None:
        self._stopping = threading.Event()
        self.began = threading.Event()

        def run() -> None:
            while not self._stopping.is_set():
                if not peer.write_once(ticket, slots, blocks):
                    self.began.set()
                time.sleep(PAUSE_S)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the last byte is written."""
        self._stopping.set()
        self._thread.join()


class Hostile(worker_pb2_grpc.WorkerServiceServicer, worker_pb2_grpc.DecodeServiceServicer):
    """``stop`` is what it does when an owner asks it to stop: "honest" stops and says so, "silent" says nothing, "lie"
    says so and writes on.  ``commit`` is what it does with commits: "accept", "refuse" or "silent"."""

    def __init__(
        self, transport: Transport, layout: KvLayout, num_slots: int, worker_id: str, incarnation: int
    ) -> None:
        self._transport = transport
        self._layout = layout
        self._region = transport.allocate(num_slots * layout.block_nbytes)
        self._descriptor = self._region.descriptor
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._remotes: dict[bytes, RemoteRegion] = {}
        self._writing: dict[str, list[Writing]] = {}  # by transfer id
        self._heard: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._stop = "honest"
        self._commit = "accept"
        self._commit_delay_s = 0.0
        self.address = ""

    def describe(self) -> dict[str, Any]:
        return {
            "worker_id": self._worker_id,
            "incarnation": self._incarnation,
            "control_address": self.address,
            "process": dataclasses.asdict(this_process()),
            "region": self._descriptor.hex(),
        }

    def behave(self, stop: str = "honest", commit: str = "accept", commit_delay_s: float = 0.0) -> None:
        with self._changed:
            self._stop, self._commit, self._commit_delay_s = stop, commit, commit_delay_s
            self._changed.notify_all()

    def heard(self) -> list[dict[str, Any]]:
        """What others have told it, in order."""
        return self._heard

    def fill(self, slots: list[int], value: int) -> None:
        for slot in slots:
            self._slot(slot)[:] = bytes([value]) * self._layout.block_nbytes

    def hashes(self, slots: list[int]) -> list[int]:
        return [xxhash.xxh3_64_intdigest(self._slot(slot)) for slot in slots]

    def release(self) -> None:
        self._region.release()

    def write(self, ticket: str, slots: list[int], blocks: list[int]) -> str:
        """Its slots into these of the owner's blocks, whatever the ticket says; what went wrong."""
        return self.write_once(worker_pb2.Ticket.FromString(bytes.fromhex(ticket)), slots, blocks)

    def write_on(self, ticket: str, slots: list[int], blocks: list[int]) -> None:
        """As ``write``, over and over.  Returns when it is in the midst of it."""
        message = worker_pb2.Ticket.FromString(bytes.fromhex(ticket))
        writing = Writing(self, message, slots, blocks)
        self._writing.setdefault(message.transfer_id, []).append(writing)
        if not writing.began.wait(30):
            raise TimeoutError("nothing was written")

    def commit(
        self, ticket: str, slots: list[int], indices: list[int], first_token: int, change: dict[str, Any]
    ) -> dict[str, str]:
        """The right commit, but for ``change``, of a writer that believes ``slots`` to hold these blocks of the prompt."""
        message = worker_pb2.Ticket.FromString(bytes.fromhex(ticket))
        num_tokens = message.num_prompt_tokens - message.first_block_index * message.layout.block_size_tokens
        digests = [
            digest_blocks(self._region.view, self._layout, [slot], index, message.num_prompt_tokens)[0]
            for slot, index in zip(slots, indices, strict=True)
        ]
        commit: dict[str, Any] = {
            **self._names(message),
            "num_blocks": len(message.blocks),
            "num_bytes": len(message.blocks) * message.layout.block_nbytes,
            "num_tokens": num_tokens,
            "first_token": common_pb2.Token(index=0, id=first_token),
            "block_digests": digests if message.verify else [],
        }
        return self._tell(message, "CommitTransfer", worker_pb2.CommitTransferRequest(**{**commit, **change}))

    def abort(self, ticket: str, change: dict[str, Any]) -> dict[str, str]:
        message = worker_pb2.Ticket.FromString(bytes.fromhex(ticket))
        abort = {**self._names(message), "reason": "it did not feel like it"}
        return self._tell(message, "AbortTransfer", worker_pb2.AbortTransferRequest(**{**abort, **change}))

    def write_once(self, ticket: worker_pb2.Ticket, slots: list[int], blocks: list[int]) -> str:
        nbytes = ticket.layout.block_nbytes
        try:
            if ticket.region not in self._remotes:
                self._remotes[ticket.region] = self._transport.open(ticket.region)
            here, there = [slot * nbytes for slot in slots], [block * nbytes for block in blocks]
            remote = self._remotes[ticket.region]
            self._transport.post(Op.WRITE, self._region, remote, here, there, nbytes).wait(60)
        except TransportError as e:
            self._remotes.pop(ticket.region, None)  # the next write opens it again
            return f"{type(e).__name__}: {e}"
        return ""

    def StopTransfer(self, request: worker_pb2.StopTransferRequest, context: Context) -> Any:
        self._note("StopTransfer", request)
        if request.writer_incarnation == self._incarnation:
            with self._changed:
                self._changed.wait_for(lambda: self._stop != "silent" or not context.is_active())
            if self._stop == "honest":
                for writing in self._writing.get(request.transfer_id, []):
                    writing.stop()
        return worker_pb2.StopTransferResponse(incarnation=self._incarnation)

    def CommitTransfer(self, request: worker_pb2.CommitTransferRequest, context: Context) -> Any:
        self._note("CommitTransfer", request)
        time.sleep(self._commit_delay_s)
        if self._commit == "refuse":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it has changed its mind")
        with self._changed:
            self._changed.wait_for(lambda: self._commit != "silent" or not context.is_active())
        return worker_pb2.CommitTransferResponse()

    def AbortTransfer(self, request: worker_pb2.AbortTransferRequest, context: Context) -> Any:
        self._note("AbortTransfer", request)
        return worker_pb2.AbortTransferResponse()

    def _note(self, rpc: str, request: Any) -> None:
        self._heard.append({"rpc": rpc, **MessageToDict(request, preserving_proto_field_name=True)})

    def _names(self, ticket: worker_pb2.Ticket) -> dict[str, Any]:
        return {
            "transfer_id": ticket.transfer_id,
            "epoch": ticket.epoch,
            "owner_incarnation": ticket.owner_incarnation,
            "writer_id": self._worker_id,
            "writer_incarnation": self._incarnation,
        }

    def _tell(self, ticket: worker_pb2.Ticket, rpc: str, request: Any) -> dict[str, str]:
        with grpc.insecure_channel(ticket.owner_control_address) as channel:
            try:
                getattr(worker_pb2_grpc.DecodeServiceStub(channel), rpc)(request, timeout=10)
            except grpc.RpcError as e:
                error = from_rpc_error(e)
                return {"error": type(error).__name__, "reason": error.reason, "message": error.message}
        return {"error": "", "reason": "", "message": ""}

    def _slot(self, slot: int) -> memoryview:
        nbytes = self._layout.block_nbytes
        return self._region.view[slot * nbytes : (slot + 1) * nbytes]


def serve(layout: KvLayout, num_slots: int, worker_id: str, listen: str) -> None:
    server = grpc.server(ThreadPoolExecutor(16))
    with create("ucx") as transport:
        peer = Hostile(transport, layout, num_slots, worker_id, secrets.randbits(63))
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(peer, server)
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(peer, server)
        peer.address = f"127.0.0.1:{server.add_insecure_port(listen)}"
        server.start()
        for line in sys.stdin:
            order = json.loads(line)
            answer = getattr(peer, order.pop("do"))(**order)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        server.stop(None)


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    serve(KvLayout(**told["layout"]), told["num_slots"], told["worker_id"], told["listen"])
