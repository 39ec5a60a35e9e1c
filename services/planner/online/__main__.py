"""python -m services.planner.online: watches a cluster and decides which workers change role, start and go, and when."""

from __future__ import annotations

import asyncio
import math
import sys
import time

import structlog
from prometheus_client import Counter, Gauge

from gateway.candidates import WorkerKey
from gateway.view import ClusterView, watch
from gateway.worker_state import ROLES
from kvferry import errors
from kvferry._roles import CertificateRole
from kvferry.api.directory.v1 import directory_pb2
from services.planner.online.attainment import Attainment, AttainmentBook
from services.planner.online.config import PlannerConfig
from services.planner.online.decider import Decider, Decision
from services.planner.online.gateways import Gateways
from services.planner.online.needs import Sample
from services.planner.online.steps import carry_out
from services.runtime import config, logs
from services.runtime.channels import Channels
from services.runtime.metrics import serve_metrics
from services.runtime.server import run_until_stopped
from services.runtime.startup import StartupError

_log = structlog.stdlib.get_logger(__name__)

_PROG = "python -m services.planner.online"

_WANTED = Gauge("kvferry_planner_workers_wanted", "Workers that a role should have.", ["role"])
_NEEDED = Gauge("kvferry_planner_workers_needed", "Always busy workers that a phase's work would take.", ["role"])
_ATTAINED = Gauge("kvferry_planner_attainment", "Share in time lately: of first tokens, of gaps.", ["objective"])
_STEPS = Counter(
    "kvferry_planner_steps",
    "Steps by kind and by what became of them: made, failed, or only said.",
    ["step", "outcome"],
)


async def run(settings: PlannerConfig) -> None:
    """Until cancelled.  Raises StartupError."""
    certificates = settings.certificates()
    try:
        replicas = settings.replicas()
    except errors.Error as error:
        raise StartupError(error.message) from error
    view, decider = ClusterView(), Decider(settings.terms)
    gateways = Gateways(settings.gateway_metrics, ca=settings.tls_ca)
    book = AttainmentBook(ttft_s=settings.ttft_s, itl_s=settings.itl_s, window_s=settings.window_s)
    with serve_metrics(settings.metrics_port):
        async with Channels(certificates, peer=CertificateRole.WORKER) as channels, asyncio.TaskGroup() as tasks:
            tasks.create_task(watch(view, settings.directory, certificates=certificates))
            _log.info("ready", applies=settings.apply)
            reason = ""
            while True:
                await asyncio.sleep(settings.look_every_s)
                attained = book.add(time.monotonic(), await gateways.read())
                states = [s for s in view.workers.values() if s.info.role in ROLES]
                decision = decider.look(time.monotonic(), [to_sample(state) for state in states], attained)
                _publish(decision, attained)
                if (step := decision.step) is not None:
                    _log.info("decision", reason=decision.reason)
                    outcome = "said"
                    if settings.apply:
                        made = await carry_out(step, states, channels, replicas, settings.change_timeout_s)
                        outcome = "made" if made else "failed"
                        _log.info("step", step=str(step), outcome=outcome)
                    _STEPS.labels(type(step).__name__.lower(), outcome).inc()
                    decider.made(time.monotonic())
                    book.forget()
                elif decision.reason != reason:
                    _log.debug("stays", reason=decision.reason)
                reason = decision.reason


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


def _publish(decision: Decision, attained: Attainment) -> None:
    for name, share in (("ttft", attained.ttft), ("itl", attained.itl)):
        _ATTAINED.labels(name).set(math.nan if share is None else share)
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
