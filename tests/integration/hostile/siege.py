"""A cluster of real workers with small pools, and what a test needs to put a hostile peer next to them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import xxhash

from kvferry import Client
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import from_rpc_error
from services.engine.layout import KvLayout
from tests.decode_calls import BlockingDecodeCall
from tests.integration.conftest import ENVIRONMENT, Running
from tests.integration.hostile.peer import Peer
from transport import Op, Transport

TICKET_LIFETIME_S = 10.0
KV_MEMORY = "48MiB"  # 68 blocks of 16 tokens
SETTINGS = {
    **ENVIRONMENT,
    "KVFERRY_VERIFY_TRANSFERS": "all",
    "KVFERRY_TICKET_LIFETIME_S": str(TICKET_LIFETIME_S),
    "KVFERRY_PAIR_QUARANTINE_S": "0.2",
}
TEXT = "A ferry takes what it is given, and asks no more of those who load it than a true word about the end of it. "
MAX_TOKENS = 8


class Asked:
    """A request on the decode worker, as a gateway would ask.  A context manager; leaving it cancels the request."""

    def __init__(self, channel: grpc.Channel, request: worker_pb2.DecodeOpen) -> None:
        self._call = BlockingDecodeCall(channel, request, 60)
        self.prompt = list(request.prompt_token_ids)
        self.cache_salt = request.cache_salt
        self.ticket = next(self._call).ticket if request.HasField("writer") else worker_pb2.Ticket()
        self.finished: worker_pb2.DecodeFinished | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def tokens(self) -> list[int]:
        """All of the answer.  Raises kvferry.Error."""
        tokens = []
        while (event := next(self._call)).WhichOneof("event") == "token":
            tokens.append(event.token.id)
        self.finished = event.finished
        return tokens

    def cancel(self) -> None:
        self._call.cancel()


@dataclass(slots=True)
class Siege:
    running: Running
    path: str  # how KV goes here: "mapped" or "rma"
    environment: dict[str, str]
    layout: KvLayout
    transport: Transport  # to look into pools with
    log_dir: Path
    _num_salts: int = 0

    @contextmanager
    def peer(self, **options: Any) -> Iterator[Peer]:
        peer = Peer(self.layout, self.environment, **options)
        try:
            yield peer
        finally:
            peer.close()

    def prompt(self, text: str, num_tokens: int = 100) -> list[int]:
        with Client(self.running.address) as client:
            return list(client.tokenize(f"{text}: " + TEXT * (num_tokens // 20)))[:num_tokens]

    def prefill_writer(self) -> worker_pb2.Writer:
        info = self.running.info("prefill-0")
        return worker_pb2.Writer(
            worker_id=info.worker_id,
            incarnation=info.incarnation,
            control_address=info.control_address,
            process=info.process,
        )

    @contextmanager
    def ask(
        self,
        prompt: Sequence[int],
        writer: worker_pb2.Writer | None,
        salt: bytes | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> Iterator[Asked]:
        """Nothing of the prompt is cached, unless a salt was used before.  Raises kvferry.Error."""
        self._num_salts += 1
        request = worker_pb2.DecodeOpen(
            request_id="besieged",
            prompt_token_ids=prompt,
            sampling=sampling(max_tokens),
            cache_salt=f"salt {self._num_salts}".encode() if salt is None else salt,
            writer=writer,
        )
        with (
            grpc.insecure_channel(self.running.local.address("decode-0")) as channel,
            Asked(channel, request) as asked,
        ):
            yield asked

    @contextmanager
    def prefilling(self, ticket: worker_pb2.Ticket, prompt: Sequence[int], salt: bytes = b"") -> Iterator[Any]:
        """The prefill worker's stream of responses; leaving it cancels the request."""
        request = worker_pb2.PrefillRequest(
            request_id=ticket.request_id,
            prompt_token_ids=prompt,
            sampling=sampling(MAX_TOKENS),
            ticket=ticket,
            cache_salt=salt,
        )
        with grpc.insecure_channel(self.running.local.address("prefill-0")) as channel:
            call = worker_pb2_grpc.PrefillServiceStub(channel).Prefill(request, timeout=60)
            try:
                yield call
            finally:
                call.cancel()

    def prefill(
        self, ticket: worker_pb2.Ticket, prompt: Sequence[int], salt: bytes = b""
    ) -> tuple[int, worker_pb2.Committed]:
        """The first token, and what became of the transfer.  Raises kvferry.Error."""
        with self.prefilling(ticket, prompt, salt) as call:
            try:
                first, committed = list(call)
            except grpc.RpcError as e:
                raise from_rpc_error(e) from e
        return first.first_token.id, committed.committed

    def answer(self, prompt: Sequence[int], salt: bytes | None = None) -> list[int]:
        """Through both workers, with a ticket of its own."""
        with self.ask(prompt, self.prefill_writer(), salt) as asked:
            self.prefill(asked.ticket, prompt, asked.cache_salt)
            return asked.tokens()

    def learn(self, peer: Peer, prompt: Sequence[int], first_slot: int = 0) -> tuple[list[int], int]:
        """Has the prefill worker write the prompt's KV into the peer's pool: (slots, first token)."""
        slots = list(range(first_slot, first_slot + -(-len(prompt) // self.layout.block_size)))
        first_token, _ = self.prefill(peer.ticket(self.running.info("prefill-0"), prompt, slots), prompt)
        return slots, first_token

    def blocks(self, name: str = "decode-0") -> common_pb2.BlockCounts:
        stats = self.running.stats(name)
        assert stats.integrity_ok, f"{name}: the block accounts do not add up"
        return stats.state.load.blocks

    @contextmanager
    def all_taken_but(self, num_free: int, writer: worker_pb2.Writer) -> Iterator[None]:
        """While it lasts, what is asked for next gets the blocks that became free last."""
        num_taken = self.blocks().free - num_free
        with ExitStack() as stack:
            if num_taken > 0:
                prompt = range(1000, 1000 + self.layout.block_size * num_taken)
                stack.enter_context(self.ask(prompt, writer))
            yield

    def read(self, descriptor: bytes, blocks: Sequence[int]) -> bytes:
        """One-sidedly, from anybody's pool."""
        nbytes = self.layout.block_nbytes
        with self.transport.allocate(len(blocks) * nbytes) as region:
            with self.transport.open(descriptor) as remote:
                here, there = [i * nbytes for i in range(len(blocks))], [block * nbytes for block in blocks]
                self.transport.post(Op.READ, region, remote, here, there, nbytes).wait(30)
            return bytes(region.view)

    def overwrite(self, descriptor: bytes, blocks: Sequence[int], value: int) -> None:
        nbytes = self.layout.block_nbytes
        with self.transport.allocate(nbytes) as region:
            region.view[:] = bytes([value]) * nbytes
            with self.transport.open(descriptor) as remote:
                there = [block * nbytes for block in blocks]
                self.transport.post(Op.WRITE, region, remote, [0] * len(blocks), there, nbytes).wait(30)

    def hashes(self, descriptor: bytes, blocks: Sequence[int]) -> list[int]:
        nbytes, kv = self.layout.block_nbytes, memoryview(self.read(descriptor, blocks))
        return [xxhash.xxh3_64_intdigest(kv[i : i + nbytes]) for i in range(0, len(kv), nbytes)]

    def wait_for(self, name: str, within_s: float, what: str, **counts: int) -> float:
        """Until a worker's blocks are counted so; seconds it took."""
        return self.running.wait_until(
            lambda: all(getattr(self.blocks(name), state) == count for state, count in counts.items()), within_s, what
        )

    def holds_for(self, name: str, seconds: float, **counts: int) -> None:
        """A worker's blocks are counted so, for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            now = self.blocks(name)
            assert {state: getattr(now, state) for state in counts} == counts
            time.sleep(0.02)

    def log(self, name: str) -> str:
        return (self.log_dir / f"{name}.log").read_text()

    def pids(self) -> dict[str, int | None]:
        return {member.name: self.running.local.pid(member.name) for member in self.running.local.members}


def sampling(max_tokens: int) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, top_p=1, top_k=0, seed=0, ignore_eos=True)


def layout_of(info: directory_pb2.WorkerInfo, num_layers: int, num_kv_heads: int, head_dim: int) -> KvLayout:
    layout = KvLayout(
        info.model.revision, info.layout.dtype, info.layout.block_size_tokens, num_layers, num_kv_heads, head_dim
    )
    assert layout.fingerprint == info.layout.fingerprint
    return layout
