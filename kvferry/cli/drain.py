"""kvferry drain: a worker takes no new requests, and those that it has finish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import grpc
import typer

from kvferry import errors
from kvferry._roles import CertificateRole
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.cli import options, output
from kvferry.cli.members import ClusterError
from kvferry.cli.service_tls import open_service_channel
from kvferry.client import DEFAULT_ADDRESS, Client
from kvferry.types import TlsConfig, Worker

LOOK_EVERY_S, LOOK_TIMEOUT_S = 1.0, 10.0


def drain(
    worker_id: Annotated[str, typer.Argument(help="As kvferry status names it.")],
    address: options.Address = DEFAULT_ADDRESS,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="KVFERRY_TLS_CERT", help="An operator's certificate.", show_default=False)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="KVFERRY_TLS_KEY", help="Its private key.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for what it has.")] = 600.0,
) -> None:
    """Let a worker finish what it has and take nothing new.

    Returns when its requests, the transfers into and out of its KV blocks and the pins on them have ended; then ending the
    process (SIGTERM) costs nobody anything. There is no way back but to start it again. The worker itself is asked, at the
    address that it gave the directory, so that must be reachable from here; where workers have certificates it listens to
    an operator's alone. Ctrl-C stops waiting, not draining.

    \b
    Example:
      kvferry drain decode-1
    """
    if tls_ca is not None and (tls_cert is None or tls_key is None):
        raise typer.BadParameter("workers ask for an operator's certificate: --tls-cert and --tls-key too")
    operator = None if tls_ca is None else TlsConfig(tls_ca, private_key=tls_key, certificate_chain=tls_cert)
    with output.failures(address), Client(address, api_key=api_key, tls=options.client_tls(tls_ca)) as client:
        worker = _find(client, worker_id)
        with (
            open_service_channel(worker.control_address, operator, CertificateRole.WORKER) as channel,
            output.console(stderr=True).status(f"draining {worker_id}") as shown,
        ):
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            try:
                draining = stub.Drain.future(worker_pb2.DrainRequest(), timeout=timeout)
                while not _has_ended(draining):
                    load = stub.GetStats(worker_pb2.GetStatsRequest(), timeout=LOOK_TIMEOUT_S).state.load
                    shown.update(f"draining {worker_id}: {_left(load)}")
            except grpc.RpcError as error:
                raise _told(errors.from_rpc_error(error), worker) from error
    output.say(f"{worker_id} holds nothing for anybody any more; end it with SIGTERM")


def _has_ended(draining: grpc.Future[worker_pb2.DrainResponse]) -> bool:
    """Waits a while for it.  Raises grpc.RpcError."""
    try:
        draining.result(timeout=LOOK_EVERY_S)
    except grpc.FutureTimeoutError:
        return False
    return True


def _left(load: directory_pb2.WorkerLoad) -> str:
    return f"{load.num_running + load.num_waiting} requests, {load.blocks.lent} blocks lent, {load.num_pins} pins left"


def _told(error: errors.Error, worker: Worker) -> errors.Error:
    if isinstance(error, errors.DeadlineError):
        return errors.UnavailableError(
            f"{worker.worker_id} is not done yet; it takes nothing new, so ask again, or allow more with --timeout"
        )
    return errors.UnavailableError(f"{worker.worker_id} at {worker.control_address}: {error.message}")


def _find(client: Client, worker_id: str) -> Worker:
    workers = client.cluster().workers
    for worker in workers:
        if worker.worker_id == worker_id:
            return worker
    known = ", ".join(sorted(w.worker_id for w in workers)) or "none"
    raise ClusterError(f"there is no worker {worker_id}; the gateway knows: {known}")
