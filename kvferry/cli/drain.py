"""kvferry drain: a worker takes no new requests, and those that it has finish."""

from __future__ import annotations

from typing import Annotated

import typer

from kvferry import errors
from kvferry.api.worker.v1 import worker_pb2
from kvferry.cli import options, output, worker_call
from kvferry.client import DEFAULT_ADDRESS
from kvferry.types import Worker


def drain(
    worker_id: Annotated[str, typer.Argument(help="As kvferry status names it.")],
    address: options.Address = DEFAULT_ADDRESS,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    tls_cert: worker_call.Certificate = None,
    tls_key: worker_call.Key = None,
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
    tls = worker_call.operator_tls(tls_ca, tls_cert, tls_key)
    with worker_call.workers(address, api_key, tls_ca, tls) as workers:
        worker = workers.find(worker_id)
        workers.wait(
            worker,
            f"draining {worker_id}",
            lambda stub: stub.Drain.future(worker_pb2.DrainRequest(), timeout=timeout),
            _told,
        )
    output.say(f"{worker_id} holds nothing for anybody any more; end it with SIGTERM")


def _told(error: errors.Error, worker: Worker) -> errors.Error:
    if isinstance(error, errors.DeadlineError):
        return errors.UnavailableError(
            f"{worker.worker_id} is not done yet; it takes nothing new, so ask again, or allow more with --timeout"
        )
    return worker_call.named(error, worker)
