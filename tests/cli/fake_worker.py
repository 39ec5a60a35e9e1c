"""A worker that holds something until a file says otherwise: ``python -m tests.cli.fake_worker ADDRESS ROLE LOAD FILE``.

Drained, it makes FILE.asked, and answers once FILE exists."""

from __future__ import annotations

import signal
import sys
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, role: str, num_running: int, until: Path) -> None:
        info = directory_pb2.WorkerInfo(role=common_pb2.WorkerRole.Value(f"WORKER_ROLE_{role.upper()}"))
        load = directory_pb2.WorkerLoad(num_running=num_running)
        self.state = directory_pb2.WorkerState(info=info, load=load)
        self.until = until

    def GetStats(self, request: worker_pb2.GetStatsRequest, context: Any) -> worker_pb2.GetStatsResponse:
        return worker_pb2.GetStatsResponse(state=self.state)

    def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        self.until.with_suffix(".asked").touch()
        while context.is_active() and not self.until.exists():
            time.sleep(0.02)
        return worker_pb2.DrainResponse()


def main() -> None:
    address, role, num_running, until = sys.argv[1:]
    server = grpc.server(futures.ThreadPoolExecutor(8))
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(FakeWorker(role, int(num_running), Path(until)), server)
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    server.start()
    ended.wait()
    server.stop(0).wait()


if __name__ == "__main__":
    main()
