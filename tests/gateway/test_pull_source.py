"""Who is to pull is told from whom, and nobody else is."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import grpc

from gateway.dispatch import Dispatcher
from gateway.job import Job
from gateway.link import DecodeLinks
from gateway.routing import Policy
from gateway.view import ClusterView
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.engine.hashing import chain_root, extend_chain
from services.runtime.channels import Channels
from tests.gateway.played import playing
from tests.gateway.reading import Reading
from tests.gateway.test_dispatch import REVISION

PROMPT = list(range(160))


class Prefill(worker_pb2_grpc.PrefillServiceServicer):
    def __init__(self) -> None:
        self.asked: asyncio.Future[worker_pb2.PrefillRequest] = asyncio.get_running_loop().create_future()

    async def Prefill(self, request: worker_pb2.PrefillRequest, context: Any) -> Any:
        self.asked.set_result(request)
        await asyncio.sleep(20)
        yield worker_pb2.PrefillResponse()


def joined(worker_id: str, role: common_pb2.WorkerRole.ValueType, address: str, num_free: int) -> directory_pb2.Event:
    info = directory_pb2.WorkerInfo(
        worker_id=worker_id, incarnation=3, role=role, control_address=address,
        model=common_pb2.ModelInfo(revision=REVISION),
        layout=common_pb2.Layout(
            fingerprint="x", content_fingerprint="x", block_size_tokens=16, block_nbytes=1000, dtype="float32"
        ),
        process=directory_pb2.ProcessIdentity(boot_id="host", pid_namespace=1, pid=2, start_time_ticks=3),
    )  # fmt: skip
    load = directory_pb2.WorkerLoad(blocks=common_pb2.BlockCounts(free=num_free), num_pinnable_blocks=50)
    return directory_pb2.Event(joined=directory_pb2.WorkerState(info=info, load=load))


async def test_the_prefill_worker_is_told_whose_blocks_to_read() -> None:
    """A decode worker without a free block holds all of the prompt; of the others nobody holds any."""
    server, prefill = grpc.aio.server(), Prefill()
    worker_pb2_grpc.add_PrefillServiceServicer_to_server(prefill, server)
    prefill_address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    chain = b"".join(extend_chain(chain_root(REVISION), PROMPT, 16))
    async with playing() as (played, address), Channels() as channels, DecodeLinks(channels) as links:
        view = ClusterView()
        held = directory_pb2.BlocksChanged(
            worker_id="holder", incarnation=3, events=[directory_pb2.BlockEvent(stored=chain)]
        )
        events = [
            joined("decode-0", common_pb2.WORKER_ROLE_DECODE, address, 100),
            joined("prefill-0", common_pb2.WORKER_ROLE_PREFILL, prefill_address, 100),
            joined("holder", common_pb2.WORKER_ROLE_DECODE, "127.0.0.1:1", 0),
            directory_pb2.Event(blocks=held),
        ]
        view.apply(directory_pb2.WatchResponse(revision=1, events=events, snapshot=True))
        dispatcher = Dispatcher(
            view, channels, links, model_revision=REVISION, routing=Policy.KV_AWARE, min_ship_tokens=32,
            max_attempts=1, stall_timeout_s=15,
        )  # fmt: skip
        async with aclosing(
            Reading(dispatcher, Job("r", PROMPT, common_pb2.SamplingParams(max_tokens=4)), 15)
        ) as answer:
            reading = asyncio.create_task(anext(answer))
            opened = (await played.sent.get()).open
            assert opened.writer.worker_id == "prefill-0"
            assert not opened.HasField("pull")
            played.say(worker_pb2.DecodeEvent(handle=opened.handle, ticket=worker_pb2.Ticket(transfer_id="t")))
            request = await prefill.asked
            pull = request.pull
            assert (pull.worker_id, pull.incarnation, pull.control_address) == ("holder", 3, "127.0.0.1:1")
            assert pull.num_blocks == 9, "the last token's block is computed"
            assert pull.within_ms == 144, "as long as 144 tokens would take by the prior"
            reading.cancel()
            await asyncio.wait((reading,))
    await server.stop(None)
