"""A worker becomes the other role's without a restart (ADR 33)."""

from __future__ import annotations

from dataclasses import replace

import structlog

from kvferry.api.common.v1 import common_pb2
from kvferry.errors import ConflictError, InvalidRequestError
from services.worker.worker import Worker

log = structlog.get_logger(__name__)

_ROLES = (common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE)


async def change_role(worker: Worker, role: common_pb2.WorkerRole.ValueType) -> None:
    """Takes no new work until what there is has ended, pins included, then goes on as ``role`` with the pool and all that
    it caches; returns when a directory knows.  The caller sets the deadline: cancelled while work is left, the worker stays
    what it was and takes work again.  Does nothing for the role that it has.  Raises ConflictError, InvalidRequestError."""
    name = worker.identity.worker_id
    if role not in _ROLES:
        raise InvalidRequestError("role must be prefill or decode")
    if not worker.takes_work:
        raise ConflictError(f"worker {name} is draining, or changing its role already", reason="DRAINING")
    if role == worker.identity.role:
        return
    if role == common_pb2.WORKER_ROLE_DECODE and worker.holds_role:
        raise ConflictError(f"worker {name} stays a prefill worker: {worker.holds_role}", reason="ROLE_IS_FIXED")
    worker.changing_role = True
    try:
        worker.report_load()
        await worker.idle()
        if worker.draining:
            raise ConflictError(f"worker {name} was told to stop meanwhile", reason="DRAINING")
        worker.identity = replace(worker.identity, role=role)
    finally:
        worker.changing_role = False
    worker.end_streams()
    log.info("role_changed", role=common_pb2.WorkerRole.Name(role).removeprefix("WORKER_ROLE_").lower())
    await worker.register_anew()
