"""kvferry role: a worker goes on as a prefill or a decode worker, without a restart."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from kvferry import errors
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.cli import options, output, worker_call
from kvferry.cli.members import ClusterError
from kvferry.client import DEFAULT_ADDRESS
from kvferry.types import Worker, WorkerRole


class NewRole(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"


_ROLES = {NewRole.PREFILL: common_pb2.WORKER_ROLE_PREFILL, NewRole.DECODE: common_pb2.WORKER_ROLE_DECODE}


def role(
    worker_id: Annotated[str, typer.Argument(help="As kvferry status names it.")],
    to: Annotated[NewRole, typer.Argument(metavar="prefill|decode", help="What it is to be.")],
    address: options.Address = DEFAULT_ADDRESS,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    tls_cert: worker_call.Certificate = None,
    tls_key: worker_call.Key = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for what it has.")] = 600.0,
) -> None:
    """Let a worker finish what it has and go on in the other role.

    Its model, its pool and what it caches stay; requests that come meanwhile go to other workers. The last decode worker
    keeps its role: nobody would answer. The worker itself is asked, as by kvferry drain. Ctrl-C, or a timeout, before it
    is done, and it stays what it was. Started again, it has the role of its command line.

    \b
    Example:
      kvferry role decode-1 prefill
    """
    tls = worker_call.operator_tls(tls_ca, tls_cert, tls_key)
    with worker_call.workers(address, api_key, tls_ca, tls) as workers:
        worker = workers.find(worker_id)
        others = [w for w in workers.known if w.role is WorkerRole.DECODE and w is not worker and not w.draining]
        if to is NewRole.PREFILL and not others:
            raise ClusterError(f"{worker_id} is the last decode worker, and without one no request is answered")
        request = worker_pb2.ChangeRoleRequest(role=_ROLES[to])
        workers.wait(
            worker,
            f"{worker_id} finishes what it has",
            lambda stub: stub.ChangeRole.future(request, timeout=timeout),
            _told,
        )
    output.say(f"{worker_id} is a {to.value} worker now")


def _told(error: errors.Error, worker: Worker) -> errors.Error:
    if isinstance(error, errors.DeadlineError):
        return errors.UnavailableError(
            f"{worker.worker_id} was not done in time and stays a {worker.role.value} worker; allow more with --timeout"
        )
    return worker_call.named(error, worker)
