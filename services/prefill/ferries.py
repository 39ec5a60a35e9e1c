"""The tickets that a prefill worker works for: each used once, stopped on demand, none forgotten."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import structlog

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import (
    ConflictError,
    Error,
    UnavailableError,
)
from services.prefill.conversion import Converter
from services.prefill.ferry import Ferry
from services.prefill.passage import ABORT_TIMEOUT_S, Passage
from services.prefill.pieces import Placement
from services.runtime.channels import Channels
from services.runtime.tasks import Tasks
from services.worker.convert import to_peer_layout
from services.worker.digester import Digester
from services.worker.pull_terms import Source
from services.worker.puller import Puller
from services.worker.remotes import Owner
from services.worker.worker import Worker
from transport import RemoteRegion
from transport.reach import Way

log = structlog.get_logger(__name__)

REMEMBER_USED = 16384
# Less than an owner waits for the answer, so that it hears why.
STOP_WAIT_S = 4.0


class Ferries:
    """Use as an async context manager.  Owned by the event loop."""

    def __init__(
        self, worker: Worker, channels: Channels, puller: Puller, converter: Converter, digester: Digester
    ) -> None:
        self.worker = worker
        self.channels = channels
        self.puller = puller
        self.converter = converter
        self.digester = digester
        self.remotes = puller.remotes
        # There only the writer's end is known to prove that nothing of a broken connection arrives.
        self._over_rdma = any(path.way is Way.RDMA for path in worker.paths)
        self.loop = asyncio.get_running_loop()
        self._passages: dict[str, Passage] = {}  # by transfer id
        self._used: OrderedDict[str, Passage | None] = OrderedDict()  # never to be used again
        self.tasks = Tasks()  # writes and messages to owners
        worker.role_checks[common_pb2.WORKER_ROLE_PREFILL] = self._check_integrity

    async def __aenter__(self) -> Ferries:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stops what is under way, and waits for the last byte."""
        passages = list(self._passages.values())
        for passage in passages:
            passage.stop("the prefill worker is shutting down")
        try:
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                for passage in passages:
                    await passage.ended.wait()
                await self.tasks.ended()
        except TimeoutError:
            log.warning("owners_do_not_answer", transfers=len(self._passages), tasks=len(self.tasks))
            self.tasks.cancel()

    async def run(
        self,
        prompt: list[int],
        params: common_pb2.SamplingParams,
        ticket: worker_pb2.Ticket,
        salt: bytes,
        source: Source | None = None,
    ) -> AsyncGenerator[common_pb2.Token | worker_pb2.Committed, None]:
        """The first token, then the commit's figures.  What ``source`` has of the prompt may be read from there first.
        Leaving early stops compute, reading and writing.  Raises ConflictError,
        having written nothing, when the ticket is not for this worker, is for blocks of other content or outside the
        owner's pool, was used or stopped before, or has expired."""
        expires_s = self.loop.time() + ticket.expires_in_ms / 1000
        passage = await self._begin(prompt, params, ticket, salt, source, expires_s)
        expiry = self.loop.call_at(expires_s, passage.stop, "the ticket expired")
        try:
            while True:
                item = await passage.outbox.get()
                if isinstance(item, Error):
                    raise item
                yield item
                if isinstance(item, worker_pb2.Committed):
                    return
        finally:
            expiry.cancel()
            passage.stop("the request was cancelled")

    async def stop_transfer(self, request: worker_pb2.StopTransferRequest) -> None:
        """Returns once nothing is written under this ticket any more, nor ever will be.  Raises UnavailableError when that
        cannot be promised, or not within STOP_WAIT_S; ConflictError when the ticket is another owner's."""
        transfer_id = request.transfer_id
        passage = self._passages.get(transfer_id) or self._used.get(transfer_id)
        if passage is None:
            self._use_up(transfer_id, None)
            return
        ticket = passage.ticket
        asks = (request.owner_id, request.owner_incarnation, request.epoch)
        if asks != (ticket.owner_id, ticket.owner_incarnation, ticket.epoch):
            raise ConflictError(
                f"transfer {transfer_id} is of {ticket.owner_id}/{ticket.owner_incarnation}, epoch {ticket.epoch}, "
                f"not of {request.owner_id}/{request.owner_incarnation}, epoch {request.epoch}",
                reason="TICKET_REFUSED",
            )
        passage.stop("the pool's owner took its blocks back")
        try:
            async with asyncio.timeout(STOP_WAIT_S):
                await passage.ended.wait()
        except TimeoutError:
            log.warning("not_stopped_yet", transfer_id=transfer_id, writes=len(passage.transfers))
            raise UnavailableError(
                f"transfer {transfer_id} is told to stop, but a write has not ended after {STOP_WAIT_S:g} s; ask again",
                reason="NOT_STOPPED_YET", retry_after_s=STOP_WAIT_S,
            ) from None  # fmt: skip
        if passage.arriving is not None:
            if self._over_rdma or not passage.arriving.has_ended():
                raise UnavailableError(
                    f"the connection of transfer {transfer_id} broke; what was sent may still arrive"
                )
            self._use_up(transfer_id, None)

    def forget(self, passage: Passage) -> None:
        del self._passages[passage.ticket.transfer_id]
        # Kept whole only where its end proves nothing.
        self._use_up(passage.ticket.transfer_id, passage if passage.arriving is not None else None)

    def _check_integrity(self) -> None:
        self.converter.check_integrity()
        assert self._passages or self.converter.is_unused, "room to convert in is held by nobody"
        self.worker.pulls.check_nothing_else_is_away()

    def _use_up(self, transfer_id: str, passage: Passage | None) -> None:
        self._used[transfer_id] = passage
        if len(self._used) > REMEMBER_USED:
            oldest = next(id_ for id_, kept in self._used.items() if kept is None)
            del self._used[oldest]

    def _require_unused(self, transfer_id: str) -> None:
        if transfer_id in self._passages or transfer_id in self._used:
            raise ConflictError(f"ticket {transfer_id} was used or stopped before", reason="TICKET_REFUSED")

    def _require_unexpired(self, ticket: worker_pb2.Ticket, expires_s: float) -> None:
        if (late_s := self.loop.time() - expires_s) >= 0:
            what = f"ticket {ticket.transfer_id} expired {late_s:.3f} s before the first write"
            raise ConflictError(what, reason="TICKET_REFUSED")

    async def _begin(
        self,
        prompt: list[int],
        params: common_pb2.SamplingParams,
        ticket: worker_pb2.Ticket,
        salt: bytes,
        source: Source | None,
        expires_s: float,
    ) -> Passage:
        received_s = time.monotonic()
        worker, identity = self.worker, self.worker.identity
        if (ticket.writer_id, ticket.writer_incarnation) != (identity.worker_id, identity.incarnation):
            raise ConflictError(
                f"ticket {ticket.transfer_id} is for writer {ticket.writer_id}/{ticket.writer_incarnation}, "
                f"this is {identity.worker_id}/{identity.incarnation}",
                reason="TICKET_REFUSED",
            )
        layout = to_peer_layout(ticket.layout, worker.layout)
        if worker.region.device is not None and replace(layout, tp=worker.layout.tp) != worker.layout:
            raise ConflictError(
                f"ticket {ticket.transfer_id} is for blocks of another size or type, and from a GPU nothing is "
                "converted; start both workers with the same --block-size and --dtype",
                reason="TICKET_REFUSED",
            )
        if ticket.num_prompt_tokens != len(prompt):
            raise ConflictError(
                f"ticket {ticket.transfer_id} is for {ticket.num_prompt_tokens} tokens, the prompt has {len(prompt)}",
                reason="TICKET_REFUSED",
            )
        self._require_unused(ticket.transfer_id)
        sequence = worker.make_sequence(ticket.request_id, prompt, params, salt, prefill_only=True)
        try:
            ferry = Ferry(len(ticket.blocks), ticket.first_block_index, len(prompt), layout.block_size)
        except ValueError as e:
            raise ConflictError(str(e), reason="TICKET_REFUSED") from e
        target = Placement(layout, tuple(ticket.blocks), ticket.first_block_index * layout.block_size)
        owners = [Owner(ticket.owner_id, ticket.owner_incarnation, rank) for rank in range(layout.tp)]
        descriptors = (ticket.region, *ticket.further_regions)
        if len(descriptors) != layout.tp:
            what = f"ticket {ticket.transfer_id} names {len(descriptors)} regions for {layout.tp} ranks"
            raise ConflictError(what, reason="TICKET_REFUSED")
        # Connects while the prompt is computed: the commit must not wait for it.
        self.channels.get(ticket.owner_control_address).get_state(try_to_connect=True)
        worker.num_opening += 1
        try:
            pulled = await self.puller.pull(sequence, source) if source else None
            remotes = await self._acquire(owners, descriptors)
        finally:
            worker.num_opening -= 1
            worker.router.changed.set()
        try:
            self._require_unused(ticket.transfer_id)  # another call may have come meanwhile
            self._require_unexpired(ticket, expires_s)
            _require_inside(ticket, min(
                remote.nbytes // layout.of_rank(rank).block_nbytes for rank, remote in enumerate(remotes)
            ))  # fmt: skip
            passage = Passage(self, ticket, sequence, ferry, target, remotes, owners, received_s, pulled)
            worker.router.subscribe(sequence.id, passage)
            worker.add(sequence)
        except Error:
            worker.router.unsubscribe(sequence.id)
            for owner in owners:
                self.remotes.release(owner)
            raise
        self._passages[ticket.transfer_id] = passage
        return passage

    async def _acquire(self, owners: Sequence[Owner], descriptors: Sequence[bytes]) -> list[RemoteRegion]:
        """All of them, or none."""
        remotes: list[RemoteRegion] = []
        try:
            for owner, descriptor in zip(owners, descriptors, strict=True):
                remotes.append(await self.remotes.acquire(owner, descriptor))
        except BaseException:
            for owner in owners[: len(remotes)]:
                self.remotes.release(owner)
            raise
        return remotes


def _require_inside(ticket: worker_pb2.Ticket, num_blocks: int) -> None:
    if max(ticket.blocks, default=-1) >= num_blocks or len(set(ticket.blocks)) < len(ticket.blocks):
        raise ConflictError(
            f"ticket {ticket.transfer_id} names blocks outside its owner's pool of {num_blocks}, or one of them twice",
            reason="TICKET_REFUSED",
        )
