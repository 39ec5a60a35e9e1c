"""Carries out what was decided: asks a worker for its role, or whoever starts and ends workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import structlog

from gateway.candidates import Role
from gateway.worker_state import ROLES
from kvferry import errors
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.types import WorkerRole
from services.planner.online.decider import Grow, Move, Shrink, Step
from services.planner.replicas import Replicas
from services.runtime.channels import Channels

_log = structlog.stdlib.get_logger(__name__)

_PROTO_ROLES = {role: number for number, role in ROLES.items()}
_WORKER_ROLES = {Role.PREFILL: WorkerRole.PREFILL, Role.DECODE: WorkerRole.DECODE}


async def carry_out(
    step: Step, states: Sequence[directory_pb2.WorkerState], channels: Channels, replicas: Replicas | None,
    timeout_s: float,
) -> bool:  # fmt: skip
    """Whether it was.  A worker's role: returns when it has it, or keeps the one that it had.  Workers that start and go
    are not waited for."""
    try:
        async with asyncio.timeout(timeout_s):
            match step:
                case Move(worker, role):
                    (info,) = (s.info for s in states if s.info.worker_id == worker.worker_id)
                    stub = worker_pb2_grpc.WorkerServiceStub(channels.get(info.control_address))
                    request = worker_pb2.ChangeRoleRequest(role=_PROTO_ROLES[role])
                    await stub.ChangeRole(request, timeout=timeout_s)
                    return True
                case Grow(role) | Shrink(role):
                    assert replicas is not None
                    return await _scale(replicas, _WORKER_ROLES[role], len(states), grows=isinstance(step, Grow))
    except TimeoutError:
        _log.warning("step_not_made", step=str(step), error=f"no answer within {timeout_s} s")
    except errors.Error as error:
        _log.warning("step_not_made", step=str(step), error=error.message)
    except grpc.aio.AioRpcError as error:
        _log.warning("step_not_made", step=str(step), code=error.code().name, error=error.details())
    return False


async def _scale(replicas: Replicas, role: WorkerRole, num_seen: int, *, grows: bool) -> bool:
    """Raises kvferry.Error."""
    counts = {each: await replicas.count(each) for each in _WORKER_ROLES.values()}
    if grows and sum(counts.values()) > num_seen:
        _log.info("one_starts_already", seen=num_seen, wanted=sum(counts.values()))
        return False
    await replicas.scale(role, counts[role] + (1 if grows else -1))
    return True
