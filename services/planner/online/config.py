"""What the online planner is told at start."""

from __future__ import annotations

from dataclasses import dataclass

from services.planner.online.decider import Terms
from services.runtime.config import option
from services.runtime.logs import LogLevel
from services.runtime.tls import TlsOptions


@dataclass(frozen=True, slots=True)
class PlannerConfig(TlsOptions):
    """The online planner: says which workers should be prefill and which decode workers, and changes their roles if it may.
    With certificates it needs an operator's."""

    directory: tuple[str, ...] = option(
        ("127.0.0.1:8472",), help="host:port of the cache directory, or of several that share a store"
    )
    apply: bool = option(False, help="change workers' roles; without, say what should change and leave it so")
    itl_s: float = option(0.05, help="seconds that a decode step may take", minimum=0.001)
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

    @property
    def terms(self) -> Terms:
        return Terms(
            itl_s=self.itl_s, window_s=self.window_s, patience=self.patience, cooldown_s=self.cooldown_s,
            min_prefill=self.min_prefill, min_decode=self.min_decode,
        )  # fmt: skip
