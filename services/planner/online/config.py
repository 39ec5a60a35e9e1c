"""What the online planner is told at start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvferry.types import WorkerRole
from services.planner.kubernetes import KubernetesReplicas
from services.planner.local import LocalReplicas
from services.planner.online.decider import Terms
from services.planner.pacing import Bounds
from services.planner.replicas import Replicas
from services.runtime.config import option
from services.runtime.logs import LogLevel
from services.runtime.tls import TlsOptions


@dataclass(frozen=True, slots=True)
class PlannerConfig(TlsOptions):
    """The online planner: says how many prefill and decode workers there should be, and changes roles, starts and ends
    workers if it may.  With certificates it needs an operator's."""

    directory: tuple[str, ...] = option(
        ("127.0.0.1:8472",), help="host:port of the cache directory, or of several that share a store"
    )
    apply: bool = option(False, help="do what is decided; without, say what should change and leave it so")
    gateway_metrics: tuple[str, ...] = option(
        (), help="URLs of the gateways' metrics, which say how much is in time; without, only work and room count"
    )
    ttft_s: float = option(2.0, help="seconds within which a first token is in time", minimum=0.001)
    itl_s: float = option(0.05, help="seconds that a decode step may take, and so a gap between tokens", minimum=0.001)
    objective: float = option(0.9, help="share of them that should be in time", minimum=0, maximum=1)
    change_roles: bool = option(True, help="roles of workers may change; off, workers start and go instead")
    min_workers: int = option(2, help="workers of both roles that stay", minimum=2)
    max_workers: int = option(0, help="workers of both roles at most; 0 leaves their number alone", minimum=0)
    supervisor: Path | None = option(
        None, help="folder of a `kvferry serve` (its --log-dir) that starts and ends workers on this machine"
    )
    kubernetes_prefill: str = option("", help="StatefulSet of prefill workers, scaled through Kubernetes' API")
    kubernetes_decode: str = option("", help="StatefulSet of decode workers")
    look_every_s: float = option(1.0, help="seconds between two looks at the cluster", minimum=0.1)
    window_s: float = option(15.0, help="seconds of the past that count", minimum=5)
    patience: int = option(3, help="looks in a row that must want a change before it is made", minimum=1)
    cooldown_s: float = option(15.0, help="least seconds between two changes", minimum=0)
    min_prefill: int = option(1, help="prefill workers that stay such", minimum=1)
    min_decode: int = option(1, help="decode workers that stay such", minimum=1)
    change_timeout_s: float = option(
        120.0, help="how long a worker may take to finish what it has before its role; then it keeps it", minimum=1
    )
    metrics_port: int = option(0, help="port of the Prometheus endpoint; 0 is off", minimum=0, maximum=65535)
    log_level: LogLevel = option(LogLevel.INFO, help="least severe lines to log")

    def __post_init__(self) -> None:
        if bool(self.kubernetes_prefill) != bool(self.kubernetes_decode):
            raise ValueError("--kubernetes-prefill and --kubernetes-decode go together")
        if self.kubernetes_prefill and self.supervisor is not None:
            raise ValueError("--supervisor and Kubernetes cannot both start workers")
        if self.kubernetes_prefill and self.change_roles:
            raise ValueError("a pod started again has its group's role: with Kubernetes say --no-change-roles")
        if self.apply and self.max_workers and not (self.kubernetes_prefill or self.supervisor):
            raise ValueError("--max-workers needs --supervisor, or StatefulSets, to start workers with")
        self.terms  # noqa: B018  for what it refuses

    def replicas(self) -> Replicas | None:
        """Raises kvferry.Error."""
        if self.supervisor is not None:
            return LocalReplicas(self.supervisor)
        if self.kubernetes_prefill:
            groups = {WorkerRole.PREFILL: self.kubernetes_prefill, WorkerRole.DECODE: self.kubernetes_decode}
            return KubernetesReplicas(groups, bounds=Bounds(maximum=max(1, self.max_workers)))
        return None

    @property
    def terms(self) -> Terms:
        return Terms(
            itl_s=self.itl_s, window_s=self.window_s, patience=self.patience, cooldown_s=self.cooldown_s,
            min_prefill=self.min_prefill, min_decode=self.min_decode, objective=self.objective,
            min_workers=self.min_workers, max_workers=self.max_workers or None, change_roles=self.change_roles,
        )  # fmt: skip
