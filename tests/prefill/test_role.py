"""What a prefill worker adds to a worker, brought up and taken down."""

from __future__ import annotations

import grpc
import pytest

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2
from services.prefill.role import PREFILL
from services.runtime.channels import Channels
from services.runtime.startup import StartupError
from services.worker.config import WorkerConfig
from services.worker.puller import Puller
from tests.prefill.two_workers import layout, side


@pytest.mark.parametrize(
    ("size", "says"),
    [("much", "is not a size"), ("191", "not one token; give at least 192 bytes"), ("9999999T", "--convert-memory: ")],
)
async def test_memory_to_convert_in_that_cannot_be(size: str, says: str) -> None:
    config = WorkerConfig(convert_memory=size)
    async with Channels() as channels, side(common_pb2.WORKER_ROLE_PREFILL, "", layout("bfloat16", 4), 8) as prefill:
        with pytest.raises(StartupError, match=says) as failed:
            async with PREFILL.serve(
                grpc.aio.server(), prefill.worker, channels, Puller(prefill.worker, channels), config
            ):
                pass
    assert "--convert-memory" in str(failed.value)


async def test_the_least_memory_to_convert_in_will_do() -> None:
    config = WorkerConfig(convert_memory="192")
    async with Channels() as channels, side(common_pb2.WORKER_ROLE_PREFILL, "", layout("bfloat16", 4), 8) as prefill:
        async with PREFILL.serve(
            grpc.aio.server(), prefill.worker, channels, Puller(prefill.worker, channels), config
        ) as stop_transfer:
            await stop_transfer(worker_pb2.StopTransferRequest(transfer_id="never heard of"))
        await prefill.quiet()
