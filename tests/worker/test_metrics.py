"""What a worker publishes."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry

from kvferry.api.common.v1 import common_pb2
from services.worker.metrics import publish_metrics
from tests.bench.system.gaps import parse
from tests.worker.tiny import make_worker
from transport import create


async def test_gaps_between_steps_are_a_histogram() -> None:
    with create("loopback") as transport:
        worker = make_worker(transport, "w", common_pb2.WORKER_ROLE_DECODE)
        for seconds in (0.00005, 0.0007, 0.0008, 3.0):
            worker.engine.gaps.observe(seconds)
        registry = CollectorRegistry()
        publish_metrics(worker, registry)
        text = prometheus_client.generate_latest(registry).decode()
    assert parse(text) == worker.engine.gaps.counts
    assert "kvferry_engine_step_gap_seconds_count 4.0" in text
    assert "kvferry_engine_step_gap_seconds_sum 3.00155" in text
