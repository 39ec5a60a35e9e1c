"""Asking a worker itself, as its operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from kvferry import errors
from kvferry._roles import CertificateRole
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.cli import options, output
from kvferry.cli.members import ClusterError
from kvferry.cli.service_tls import open_service_channel
from kvferry.client import Client
from kvferry.types import TlsConfig, Worker

LOOK_EVERY_S, LOOK_TIMEOUT_S = 1.0, 10.0

Certificate = Annotated[
    Path | None, typer.Option(envvar="KVFERRY_TLS_CERT", help="An operator's certificate.", show_default=False)
]
Key = Annotated[Path | None, typer.Option(envvar="KVFERRY_TLS_KEY", help="Its private key.", show_default=False)]


def operator_tls(ca: Path | None, certificate: Path | None, key: Path | None) -> TlsConfig | None:
    """None without TLS.  Raises BadParameter where a file is missing."""
    if ca is None:
        return None
    if certificate is None or key is None:
        raise typer.BadParameter("workers ask for an operator's certificate: --tls-cert and --tls-key too")
    return TlsConfig(ca, private_key=key, certificate_chain=certificate)


@dataclass(frozen=True, slots=True)
class Workers:
    """Those that a gateway knows; asked with an operator's certificate where there are any."""

    known: tuple[Worker, ...]
    tls: TlsConfig | None

    def find(self, worker_id: str) -> Worker:
        """Raises ClusterError."""
        for worker in self.known:
            if worker.worker_id == worker_id:
                return worker
        known = ", ".join(sorted(w.worker_id for w in self.known)) or "none"
        raise ClusterError(f"there is no worker {worker_id}; the gateway knows: {known}")

    def wait(
        self,
        worker: Worker,
        doing: str,
        start: Callable[[worker_pb2_grpc.WorkerServiceStub], grpc.Future[Any]],
        told: Callable[[errors.Error, Worker], errors.Error],
    ) -> None:
        """Until what ``start`` began has ended, showing what is left.  Raises what ``told`` makes of an error."""
        with (
            open_service_channel(worker.control_address, self.tls, CertificateRole.WORKER) as channel,
            output.console(stderr=True).status(doing) as shown,
        ):
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            try:
                call = start(stub)
                while not _has_ended(call):
                    load = stub.GetStats(worker_pb2.GetStatsRequest(), timeout=LOOK_TIMEOUT_S).state.load
                    shown.update(f"{doing}: {_left(load)}")
            except grpc.RpcError as error:
                raise told(errors.from_rpc_error(error), worker) from error


@contextmanager
def workers(address: str, api_key: str | None, ca: Path | None, tls: TlsConfig | None) -> Iterator[Workers]:
    """Prints failures, and leaves with them."""
    with output.failures(address), Client(address, api_key=api_key, tls=options.client_tls(ca)) as client:
        yield Workers(tuple(client.cluster().workers), tls)


def named(error: errors.Error, worker: Worker) -> errors.Error:
    """What a worker answered, with its name."""
    return errors.UnavailableError(f"{worker.worker_id} at {worker.control_address}: {error.message}")


def _has_ended(call: grpc.Future[Any]) -> bool:
    """Waits a while for it.  Raises grpc.RpcError."""
    try:
        call.result(timeout=LOOK_EVERY_S)
    except grpc.FutureTimeoutError:
        return False
    return True


def _left(load: directory_pb2.WorkerLoad) -> str:
    return f"{load.num_running + load.num_waiting} requests, {load.blocks.lent} blocks lent, {load.num_pins} pins left"
