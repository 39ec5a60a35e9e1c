"""The online planner's rules in a simulated cluster, by virtual time.  Pure."""

from __future__ import annotations

from services.planner.online.decider import Decider, Decision, Move, Terms
from services.planner.online.needs import Sample
from services.planner.simulator.cluster import Cluster
from services.planner.simulator.worker import SimulatedWorker


class Autoscaler:
    """Looks at ``cluster`` every ``every_s`` until ``until_s``, and has done what is decided.  Make it before the run."""

    def __init__(self, cluster: Cluster, terms: Terms, *, every_s: float, until_s: float) -> None:
        self.decisions: list[tuple[float, Decision]] = []  # those that moved a worker
        self._cluster, self._decider = cluster, Decider(terms)
        for n in range(1, int(until_s / every_s) + 1):
            cluster.queue.at(n * every_s, self._look)

    def _look(self) -> None:
        cluster, now_s = self._cluster, self._cluster.queue.now_s
        decision = self._decider.look(now_s, [_sample(worker, now_s) for worker in cluster.workers])
        match decision.step:
            case Move(key, role):
                self.decisions.append((now_s, decision))
                moving = next(w for w in cluster.workers if w.key == key)
                cluster.change_role(moving, role, lambda: self._decider.made(cluster.queue.now_s))


def _sample(worker: SimulatedWorker, now_s: float) -> Sample:
    load, counts = worker.load(), worker.scheduler.pool.counts()
    return Sample(
        key=worker.key,
        role=worker.role,
        draining=worker.draining,
        prefill_s=worker.prefill_s,
        decode_s=worker.decode_s,
        lifetime_s=now_s,
        num_running=load.num_requests,
        num_queued_prefill_tokens=load.num_queued_prefill_tokens,
        prefill_tokens_per_s=load.rates.prefill_tokens_per_s,
        step_base_s=load.rates.step_base_s,
        step_per_sequence_s=load.rates.step_per_sequence_s,
        kv_share=counts.active / counts.total,
    )
