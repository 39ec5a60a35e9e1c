"""Who guesses: what the request says, else the worker's default, and never a sequence that is only prefilled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import prometheus_client
import pytest

from kvferry.api.common.v1 import common_pb2
from services.worker.metrics import publish_metrics
from services.worker.worker import Worker
from tests.worker.tiny import SAMPLING, make_worker
from transport import create


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    with create("loopback") as transport:
        yield make_worker(transport, "decode-0", common_pb2.WORKER_ROLE_DECODE)


def drafts(worker: Worker, asked: bool | None, *, prefill_only: bool = False) -> bool:
    params = common_pb2.SamplingParams(speculate=asked)
    params.MergeFrom(SAMPLING)
    return worker.make_sequence("r", [1, 2], params, b"", prefill_only=prefill_only).drafter is not None


async def test_a_request_decides_and_else_the_worker(worker: Worker) -> None:
    for default in (False, True):
        worker.speculates = default
        assert [drafts(worker, asked) for asked in (None, True, False)] == [default, True, False]
    worker.identity = replace(worker.identity, role=common_pb2.WORKER_ROLE_PREFILL)
    assert not drafts(worker, True, prefill_only=True)


async def test_drafts_are_counted_in_the_metrics(worker: Worker) -> None:
    registry = prometheus_client.CollectorRegistry()
    publish_metrics(worker, registry)
    worker.engine.work.drafted_tokens, worker.engine.work.accepted_tokens = 9, 4
    assert registry.get_sample_value("kvferry_drafted_tokens_total") == 9
    assert registry.get_sample_value("kvferry_accepted_tokens_total") == 4
