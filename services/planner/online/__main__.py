"""python -m services.planner.online: watches a cluster and decides which worker should change its role, and when."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence

import grpc
import structlog
from prometheus_client import Counter, Gauge

from gateway.candidates import WorkerKey
from gateway.view import ClusterView, watch
from gateway.worker_state import ROLES
from kvferry._roles import CertificateRole
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.planner.online.config import PlannerConfig
from services.planner.online.decider import Decider, Decision, Move
from services.planner.online.needs import Sample
from services.runtime import config, logs
from services.runtime.channels import Channels
from services.runtime.metrics import serve_metrics
from services.runtime.server import run_until_stopped

_log = structlog.stdlib.get_logger(__name__)

_PROG = "python -m services.planner.online"
_PROTO_ROLES = {role: number for number, role in ROLES.items()}

_WANTED = Gauge("kvferry_planner_workers_wanted", "Workers that a role should have.", ["role"])
_NEEDED = Gauge("kvferry_planner_workers_needed", "Always busy workers that a phase's work would take.", ["role"])
_MOVES = Counter(
    "kvferry_planner_role_changes", "Changes of role by what became of them: made, failed, or only said.", ["outcome"]
)


async def run(settings: PlannerConfig) -> None:
    """Until cancelled.  Raises StartupError."""
    certificates = settings.certificates()
    view, decider = ClusterView(), Decider(settings.terms)
    with serve_metrics(settings.metrics_port):
        async with Channels(certificates, peer=CertificateRole.WORKER) as channels, asyncio.TaskGroup() as tasks:
            tasks.create_task(watch(view, settings.directory, certificates=certificates))
            _log.info("ready", applies=settings.apply)
            reason = ""
            while True:
                await asyncio.sleep(settings.look_every_s)
                states = [s for s in view.workers.values() if s.info.role in ROLES]
                decision = decider.look(time.monotonic(), [to_sample(state) for state in states])
                _publish(decision)
                if decision.move is not None:
                    _log.info("decision", reason=decision.reason)
                    await _carry_out(decision.move, states, channels, settings)
                    decider.moved(time.monotonic())
                elif decision.reason != reason:
                    _log.debug("stays", reason=decision.reason)
                reason = decision.reason


async def _carry_out(
    move: Move, states: Sequence[directory_pb2.WorkerState], channels: Channels, settings: PlannerConfig
) -> None:
    """Returns when the worker has its role, or keeps the one that it had."""
    if not settings.apply:
        _MOVES.labels("said").inc()
        return
    (info,) = (s.info for s in states if s.info.worker_id == move.worker.worker_id)
    stub = worker_pb2_grpc.WorkerServiceStub(channels.get(info.control_address))
    request = worker_pb2.ChangeRoleRequest(role=_PROTO_ROLES[move.role])
    try:
        await stub.ChangeRole(request, timeout=settings.change_timeout_s)
    except grpc.aio.AioRpcError as error:
        _MOVES.labels("failed").inc()
        _log.warning("role_not_changed", worker_id=info.worker_id, code=error.code().name, error=error.details())
    else:
        _MOVES.labels("made").inc()
        _log.info("role_changed", worker_id=info.worker_id, role=move.role.name.lower())


def to_sample(state: directory_pb2.WorkerState) -> Sample:
    """Of a worker with a role that is known here."""
    info, load = state.info, state.load
    seconds = {phase.phase: phase.seconds for phase in load.phases}
    return Sample(
        key=WorkerKey(info.worker_id, info.incarnation),
        role=ROLES[info.role],
        draining=load.draining,
        prefill_s=seconds.get(directory_pb2.PHASE_PREFILL, 0.0),
        decode_s=seconds.get(directory_pb2.PHASE_DECODE, 0.0),
        lifetime_s=sum(seconds.values()),
        num_running=load.num_running + load.num_waiting,
        num_queued_prefill_tokens=load.num_queued_prefill_tokens,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        step_base_s=load.decode_step_base_s,
        step_per_sequence_s=load.decode_step_per_sequence_s,
        kv_share=(load.blocks.active + load.blocks.lent) / max(1, load.blocks.total),
    )


def _publish(decision: Decision) -> None:
    _WANTED.labels("prefill").set(decision.num_prefill)
    _WANTED.labels("decode").set(decision.num_decode)
    if decision.needs is not None:
        _NEEDED.labels("prefill").set(decision.needs.prefill)
        _NEEDED.labels("decode").set(decision.needs.decode)


def main() -> int:
    settings = config.load(PlannerConfig, sys.argv[1:], _PROG)
    logs.configure("planner", level=settings.log_level.value)
    return run_until_stopped(run(settings), prog=_PROG)


if __name__ == "__main__":
    sys.exit(main())
