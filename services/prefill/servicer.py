"""kvferry.api.worker.v1.PrefillService: translation between messages and ``Ferries``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import structlog

from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.prefill.ferries import Ferries
from services.worker.convert import to_source

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class PrefillServicer(worker_pb2_grpc.PrefillServiceServicer):
    def __init__(self, ferries: Ferries) -> None:
        self._ferries = ferries

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: Context
    ) -> AsyncIterator[worker_pb2.PrefillResponse]:
        steps = self._ferries.run(
            list(request.prompt_token_ids), request.sampling, request.ticket, request.cache_salt,
            to_source(request.pull) if request.HasField("pull") else None,
        )  # fmt: skip
        async with aclosing(steps):
            async for item in steps:
                if isinstance(item, worker_pb2.Committed):
                    transfer = item.transfer
                    log.info(
                        "committed", blocks=transfer.num_blocks, path=transfer.path, exposed_us=transfer.exposed_us
                    )
                    yield worker_pb2.PrefillResponse(committed=item)
                else:
                    yield worker_pb2.PrefillResponse(first_token=item)
