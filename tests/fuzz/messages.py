"""What services and clients send each other: protobuf requests through what reads them, region descriptors, block events
into the compiled index."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, suppress
from functools import cache
from typing import Any

from google.protobuf.message import DecodeError, Message
from hypothesis import strategies as st

from gateway.tenants import EVERYBODY
from gateway.validation import Validator
from kvferry import errors
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.inference.v1 import inference_pb2
from kvferry.api.worker.v1 import worker_pb2
from services.decode.convert import to_writer
from services.decode.reservations import Reservations, Terms
from services.decode.servicer import DecodeServicer
from services.decode.session import Session
from services.directory.index import HASH_NBYTES, BlockIndex
from services.directory.memory_store import MemoryStore
from services.directory.servicer import DirectoryServicer
from services.engine.checkpoint import DEFAULT_MODEL
from services.engine.layout import KvLayout
from services.engine.model_files import open_model
from services.prefill.ferries import _require_inside
from services.runtime.channels import Channels
from services.runtime.tier import Tier
from services.worker.convert import to_hashes, to_layout_proto, to_peer_layout, to_sequence, to_source
from services.worker.puller import Puller
from services.worker.share import Share
from tests.fuzz.inputs import INTEGERS, damaged, messages
from tests.fuzz.mutation import framed, frames, frames_of, message
from tests.fuzz.target import Target
from tests.worker.tiny import NUM_BLOCKS, SAMPLING, HeldDigester, make_worker
from transport import create
from transport.descriptor import Descriptor
from transport.errors import BadDescriptor
from transport.segments import SegmentName

LAYOUT = KvLayout(model_revision="r", dtype="float32", block_size=4, num_layers=2, num_kv_heads=2, head_dim=8)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _run(work: Coroutine[Any, Any, bool]) -> bool:
    return _loop().run_until_complete(asyncio.wait_for(work, 20))


@cache
def _validator() -> Validator:
    return Validator.for_model(open_model(DEFAULT_MODEL))


def _generate(data: bytes) -> bool:
    async def validate() -> bool:
        await _validator().to_job(inference_pb2.GenerateRequest.FromString(data), EVERYBODY)
        return True

    try:
        return _run(validate())
    except (DecodeError, errors.InvalidRequestError, errors.NotFoundError):
        return False


def _prefill(data: bytes) -> bool:
    """As a prefill worker reads it before it computes."""
    try:
        request = worker_pb2.PrefillRequest.FromString(data)
        to_source(request.pull)
        to_hashes(request.cache_salt)
        to_sequence(
            1, list(request.prompt_token_ids), request.sampling, chain_root=request.cache_salt, eos_ids=frozenset(),
            vocab_size=100, context_length=64, prefill_only=True, speculate=False,
        )  # fmt: skip
        to_peer_layout(request.ticket.layout, LAYOUT)
        _require_inside(request.ticket, 16)
    except (DecodeError, errors.InvalidRequestError, errors.ConflictError):
        return False
    return True


def _writer(data: bytes) -> bool:
    try:
        to_writer(worker_pb2.Writer.FromString(data))
    except DecodeError:
        return False
    return True


def _descriptor(data: bytes) -> bool:
    try:
        assert Descriptor.unpack(data, backend="ucx").pack() == data
    except BadDescriptor:
        return False
    return True


def _sealed(data: bytes) -> bool:
    """The same behind the digest, which damage alone never passes."""
    return _descriptor(data + hashlib.blake2b(data, digest_size=16).digest())


class _DecodeWorker:
    """A worker without a model, whose steps an input takes one by one."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        self._worker = make_worker(
            self._stack.enter_context(create("loopback")), "decode-0", common_pb2.WORKER_ROLE_DECODE
        )
        terms = Terms(ticket_lifetime_s=3600.0, verified=Share.parse("none"), pair_quarantine_s=60.0)
        channels = await self._stack.enter_async_context(Channels())
        puller = await self._stack.enter_async_context(Puller(self._worker, channels))
        self._reservations = await self._stack.enter_async_context(
            Reservations(self._worker, channels, puller, HeldDigester(), terms)  # type: ignore[arg-type]
        )
        self._servicer = DecodeServicer(self._worker, self._reservations)

    async def serve(self, data: bytes) -> bool:
        """Whether a request was begun.  Frames: opens and cancels, commits, aborts, and steps of the engine.  A commit or
        an abort whose transfer is "@" names the last ticket as its writer would."""
        session = Session(self._worker, self._reservations)
        queue: asyncio.Queue[worker_pb2.DecodeRequest | None] = asyncio.Queue()
        following = asyncio.create_task(session.follow(_each(queue)))
        tickets: list[worker_pb2.Ticket] = []
        begun = False

        async def settle() -> None:
            nonlocal begun
            for _ in range(6):
                await asyncio.sleep(0)
            while session._unread:
                for event in session._unread.popleft().events:
                    session._num_unread -= 1
                    begun |= not event.HasField("failure")
                    if event.HasField("ticket"):
                        tickets.append(event.ticket)

        for kind, content in frames_of(data):
            with suppress(DecodeError, errors.InvalidRequestError, errors.ConflictError):
                match kind % 4:
                    case 0:
                        request = worker_pb2.DecodeRequest.FromString(content)
                        _stay_here(request)
                        queue.put_nowait(request)
                    case 1:
                        commit = worker_pb2.CommitTransferRequest.FromString(content)
                        await self._servicer.CommitTransfer(_aimed(commit, tickets), None)  # type: ignore[arg-type]
                    case 2:
                        abort = worker_pb2.AbortTransferRequest.FromString(content)
                        await self._servicer.AbortTransfer(_aimed(abort, tickets), None)  # type: ignore[arg-type]
                    case 3:
                        self._worker.engine.step()
            await settle()
            assert self._worker.integrity_ok()
        queue.put_nowait(None)
        await settle()
        session.close()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        for ticket in tickets:  # writers' words that they have stopped
            with suppress(errors.ConflictError):
                await self._servicer.AbortTransfer(  # type: ignore[call-arg]
                    _aimed(worker_pb2.AbortTransferRequest(transfer_id="@"), [ticket]),
                    None,  # type: ignore[arg-type]
                )
        self._worker.engine.step()
        await settle()
        assert self._worker.integrity_ok()
        with self._worker.engine.exclusive(wake=False) as scheduler:
            counts = scheduler.pool.counts()
        assert counts.free + counts.cached == NUM_BLOCKS, counts
        return begun


async def _each(queue: asyncio.Queue[worker_pb2.DecodeRequest | None]) -> AsyncIterator[worker_pb2.DecodeRequest]:
    while (item := await queue.get()) is not None:
        yield item


def _stay_here(request: worker_pb2.DecodeRequest) -> None:
    """No input opens a connection to an address of its choosing."""
    if request.HasField("open"):
        if request.open.HasField("writer"):
            request.open.writer.control_address = "127.0.0.1:1"
        request.open.ClearField("pull")


def _aimed(request: Any, tickets: list[worker_pb2.Ticket]) -> Any:
    if request.transfer_id == "@" and tickets:
        ticket = tickets[-1]
        request.transfer_id, request.epoch = ticket.transfer_id, ticket.epoch
        request.owner_incarnation = ticket.owner_incarnation
        request.writer_id, request.writer_incarnation = ticket.writer_id, ticket.writer_incarnation
    return request


@cache
def _decode_worker() -> _DecodeWorker:
    worker = _DecodeWorker()
    _loop().run_until_complete(worker.start())
    return worker


def _decode(data: bytes) -> bool:
    return _run(_decode_worker().serve(data))


_DIRECTORY: tuple[type[Message], ...] = (
    directory_pb2.RegisterRequest, directory_pb2.PublishBlocksRequest, directory_pb2.LookupRequest,
    directory_pb2.KeepAliveRequest, directory_pb2.DeregisterRequest,
)  # fmt: skip


def _directory(data: bytes) -> bool:
    """Frames of requests to one directory.  The lease 1 stands for the last that was given."""

    async def serve() -> bool:
        store = MemoryStore(max_events=1000, max_index_entries=200)
        servicer = DirectoryServicer(store)
        lease_id, served = 0, False
        for kind, content in frames_of(data):
            type_ = _DIRECTORY[kind % len(_DIRECTORY)]
            with suppress(DecodeError, errors.InvalidRequestError, errors.NotFoundError, errors.ConflictError):
                request: Any = type_.FromString(content)
                if getattr(request, "lease_id", 0) == 1:
                    request.lease_id = lease_id
                response = await getattr(servicer, type_.__name__.removesuffix("Request"))(request, None)
                served = True
                lease_id = getattr(response, "lease_id", lease_id)
            store.directory.check_integrity()
        return served

    return _run(serve())


def _index(data: bytes) -> bool:
    """Calls into the compiled index, each held against sets of hashes; few hashes, few slots, and more workers than one
    group of it takes."""
    index = BlockIndex(max_entries=300, table_bits=2)
    naive: dict[tuple[str, Tier], set[bytes]] = {}
    left_out = False
    for at in range(0, len(data) - 3, 4):
        op, worker, first, count = data[at : at + 4]
        name, tier = f"w{worker % 80}", Tier.HOST if op & 8 else Tier.DEVICE
        hashes = b"".join(bytes([(first + i) % 64]) * HASH_NBYTES for i in range(count % 70))
        each = {hashes[i : i + HASH_NBYTES] for i in range(0, len(hashes), HASH_NBYTES)}
        match op % 5:
            case 0 | 1:
                index.stored(name, hashes, tier)
                naive.setdefault((name, tier), set()).update(each)
            case 2:
                index.removed(name, hashes, tier)
                naive.get((name, tier), set()).difference_update(each)
            case 3:
                index.cleared(name)
                for tier_ in Tier:
                    naive.pop((name, tier_), None)
            case 4:
                found = index.longest_prefix(hashes)
                assert all(0 < prefix.num_device_blocks <= prefix.num_blocks <= len(hashes) // HASH_NBYTES
                           or prefix.num_device_blocks == 0 < prefix.num_blocks for prefix in found.values())  # fmt: skip
        left_out |= index.num_left_out > 0
        for tier_ in Tier:
            held = b"".join(index.held_by(name, tier_, 7))
            held_each = {held[i : i + HASH_NBYTES] for i in range(0, len(held), HASH_NBYTES)}
            known = naive.get((name, tier_), set())
            assert held_each <= known if left_out else held_each == known
    index.check_integrity()
    return len(data) >= 4


def _bytes_of(kind: type[Message], *whole: Message) -> st.SearchStrategy[bytes]:
    made = messages(kind).map(lambda m: m.SerializeToString())
    known = [st.just(message.SerializeToString()) for message in whole]
    return st.one_of(*known, made, damaged(st.one_of(*known, made)))


def _frames(*kinds: tuple[type[Message], Message]) -> st.SearchStrategy[bytes]:
    """Among the frames are whole ones, in the order of their numbers, so that some succeed."""
    some = [st.tuples(st.just(number), _bytes_of(kind, whole)) for number, (kind, whole) in enumerate(kinds)]
    ideal = [(number, whole.SerializeToString()) for number, (_, whole) in enumerate(kinds)]
    return st.one_of(st.just(framed(ideal)), st.lists(st.one_of(*some), max_size=8).map(framed))


_UINT64 = INTEGERS.map(lambda value: abs(value) % (1 << 64))
_DESCRIPTORS = st.builds(
    lambda incarnation, base, nbytes, pid, address, key: Descriptor(
        "ucx", incarnation, base, nbytes, SegmentName(bytes(16), pid, 3) if pid else None, address, key).pack(),
    _UINT64, _UINT64, _UINT64, st.integers(0, 2**32 - 1), st.binary(max_size=30), st.binary(max_size=30))  # fmt: skip
_GENERATE = inference_pb2.GenerateRequest(
    chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")]),
    sampling=common_pb2.SamplingParams(max_tokens=3, top_p=0.5, stop_token_ids=[1]), stop=["x"],
)  # fmt: skip
_WRITER = worker_pb2.Writer(worker_id="prefill-0", incarnation=7, control_address="127.0.0.1:1")
_OPEN = worker_pb2.DecodeRequest(open=worker_pb2.DecodeOpen(
    handle=1, request_id="r", prompt_token_ids=[1, 2, 3, 4, 5], sampling=SAMPLING, writer=_WRITER))  # fmt: skip
_COMMIT = worker_pb2.CommitTransferRequest(
    transfer_id="@", num_blocks=2, num_tokens=5, num_bytes=1, first_token=common_pb2.Token(index=0, id=7)
)  # fmt: skip
_PREFILL = worker_pb2.PrefillRequest(
    prompt_token_ids=[1, 2, 3], sampling=SAMPLING, cache_salt=bytes(16),
    ticket=worker_pb2.Ticket(transfer_id="t", epoch=1, blocks=[0, 3], layout=to_layout_proto(LAYOUT)),
)  # fmt: skip
_REGISTER = directory_pb2.RegisterRequest(
    info=directory_pb2.WorkerInfo(worker_id="w", incarnation=5, control_address="a:1", role=common_pb2.WORKER_ROLE_DECODE),
    lease_ttl_ms=5000,
)  # fmt: skip
_PUBLISH = directory_pb2.PublishBlocksRequest(lease_id=1, first_sequence=1, events=[
    directory_pb2.BlockEvent(stored=bytes(range(64)), tier=Tier.DEVICE.value),
    directory_pb2.BlockEvent(removed=bytes(range(16)), tier=Tier.DEVICE.value),
    directory_pb2.BlockEvent(stored=bytes(range(32)), tier=Tier.HOST.value)])  # fmt: skip

TARGETS = [
    Target("generate", _bytes_of(inference_pb2.GenerateRequest, _GENERATE), _generate,
           message(inference_pb2.GenerateRequest)),
    Target("prefill", _bytes_of(worker_pb2.PrefillRequest, _PREFILL), _prefill, message(worker_pb2.PrefillRequest)),
    Target("writer", _bytes_of(worker_pb2.Writer, _WRITER), _writer, message(worker_pb2.Writer)),
    Target("decode", _frames((worker_pb2.DecodeRequest, _OPEN), (worker_pb2.CommitTransferRequest, _COMMIT),
                             (worker_pb2.AbortTransferRequest, worker_pb2.AbortTransferRequest(transfer_id="@")),
                             (common_pb2.Token, common_pb2.Token())),
           _decode, frames(worker_pb2.DecodeRequest, worker_pb2.CommitTransferRequest, worker_pb2.AbortTransferRequest,
                           common_pb2.Token)),
    Target("directory", _frames(
        (directory_pb2.RegisterRequest, _REGISTER), (directory_pb2.PublishBlocksRequest, _PUBLISH),
        (directory_pb2.LookupRequest, directory_pb2.LookupRequest(hashes=bytes(range(64)))),
        (directory_pb2.KeepAliveRequest, directory_pb2.KeepAliveRequest(lease_id=1)),
        (directory_pb2.DeregisterRequest, directory_pb2.DeregisterRequest(lease_id=1))),
        _directory, frames(*_DIRECTORY), native=True),
    Target("block_index", st.binary(max_size=400), _index, native=True),
    Target("descriptor", damaged(_DESCRIPTORS), _descriptor),
    Target("descriptor_sealed", _DESCRIPTORS.map(lambda data: data[:-16]), _sealed),
]  # fmt: skip
